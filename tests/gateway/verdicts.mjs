// Reads runs from standard input, and writes the verdict on each: node verdicts.mjs PATH-OF-VERDICT.
import { readFileSync } from "node:fs";

const { verdict } = await import(process.argv[2]);
console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf-8")).map(verdict)));
