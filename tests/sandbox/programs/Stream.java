// Streams a POST with the JDK's HttpClient, and writes each piece as it comes.
import java.io.InputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

public class Stream {
    public static void main(String[] arguments) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(URI.create(arguments[0]))
            .header("content-type", "application/json")
            .header("authorization", "Bearer " + arguments[1])
            .POST(HttpRequest.BodyPublishers.ofString("{\"model\":\"m\",\"stream\":true}"))
            .build();
        HttpResponse<InputStream> response =
            HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofInputStream());
        if (response.statusCode() != 200) {
            System.err.println(response.statusCode() + " " + new String(response.body().readAllBytes()));
            System.exit(1);
        }
        byte[] piece = new byte[65536];
        for (int size; (size = response.body().read(piece)) > 0;) {
            System.out.write(piece, 0, size);
            System.out.flush();
        }
        System.exit(0);
    }
}
