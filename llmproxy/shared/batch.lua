#!lua
-- What processes of llmproxy know together (ADR-0041).  One call carries what a process has to say and to ask since
-- its last one, and is applied as a whole or not at all: a process numbers its calls, and one number counts once.
--
-- Keys, each below the prefix of the configuration (KEYS[1]):
--   procs       who lives: process -> when it counts as gone, in milliseconds
--   of:PROCESS  what it holds: client -> streams; of "" the number of its last call, of "=" what that said, empty
--               if that call came to nothing; these two stay when the process counts as gone, for it may go on
--   p:PROVIDER  who has places there: process -> places held, busy, waited for, and the weight of who waits
--   events      what was told to all, by its number; the last number is in "told"
--   s:KEY       the provider that a client or a session is at
--   born        since when the engine knows all this; another time says that it has lost what it knew
--   c:CLIENT    what a client uses:  s streams; r, t requests and tokens of the last minute, f and l its first and
--               last bucket; qN and kN requests and tokens of bucket N; d the day, u and z its tokens, used and settled
--
-- The engine's clock decides, and is read once.

local BUCKET, LIVE, RING = 250, 240, 256  -- milliseconds of a bucket, how many are a minute, and their places
local EVENTS, HEARD = 2000, 100           -- how many events are kept, and told in one call
local KEEP = 3 * 86400                    -- seconds for which a client's key stays

local prefix, process, call, lease = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local bucket, today = math.floor(now / BUCKET), math.floor(time[1] / 86400)
local procs, held = prefix .. 'procs', prefix .. 'of:' .. process

local function number(value) return tonumber(value) or 0 end

-- Return what a client uses; what is older than a minute has left.
local function load(client)
  local key = prefix .. 'c:' .. client
  local at = redis.call('HMGET', key, 's', 'r', 't', 'f', 'l', 'd', 'u', 'z')
  local used = {key = key, s = number(at[1]), r = number(at[2]), t = number(at[3]), f = tonumber(at[4]),
                l = number(at[5]), d = number(at[6]), u = number(at[7]), z = number(at[8])}
  local since = bucket - LIVE
  if not used.f then
    redis.call('HSET', key, 's', 0)
    redis.call('EXPIRE', key, KEEP)
    used.f, used.l = since, bucket
  elseif used.f > bucket then  -- the clock was put back by more than a minute
    redis.call('DEL', key)
    redis.call('HSET', key, 's', used.s)
    redis.call('EXPIRE', key, KEEP)
    used.r, used.t, used.f, used.l = 0, 0, since, bucket
  end
  if used.f < since then
    local last = math.min(used.l, since - 1)
    for one = used.f, last, 32 do
      local names = {}
      for each = one, math.min(one + 31, last) do
        names[#names + 1] = 'q' .. each % RING
        names[#names + 1] = 'k' .. each % RING
      end
      local values = redis.call('HMGET', key, unpack(names))
      for place = 1, #names, 2 do
        used.r, used.t = used.r - number(values[place]), used.t - number(values[place + 1])
      end
      redis.call('HDEL', key, unpack(names))
    end
    used.f = since
  end
  if used.d ~= today then
    used.d, used.u, used.z = today, 0, 0
    redis.call('EXPIRE', key, KEEP)
  end
  return used
end

local function save(used)
  redis.call('HSET', used.key, 's', used.s, 'r', used.r, 't', used.t, 'f', used.f, 'l', used.l, 'd', used.d,
             'u', used.u, 'z', used.z)
end

-- Let requests and tokens come in a bucket.  Requests that have left the minute meanwhile come no more, and what
-- they cost can only grow again now.  So it is where nobody knows when they came: no bucket is to count less than it has.
local function add(used, at, requests, tokens)
  if at < 0 or at > bucket then
    at = bucket
    if requests == 0 then tokens = math.max(0, tokens) end
  elseif at < used.f then
    if requests ~= 0 then return end
    at, tokens = bucket, math.max(0, tokens)
  end
  if requests ~= 0 then redis.call('HINCRBY', used.key, 'q' .. at % RING, requests) end
  if tokens ~= 0 then redis.call('HINCRBY', used.key, 'k' .. at % RING, tokens) end
  used.r, used.t = used.r + requests, used.t + tokens
  if at > used.l then used.l = at end
end

local function hold(client, used, streams)
  used.s = math.max(0, used.s + streams)
  if redis.call('HINCRBY', held, client, streams) <= 0 then redis.call('HDEL', held, client) end
end

-- Return the milliseconds until so many requests (q) or tokens (k) have left the minute.
local function wait(used, over, kind)
  if over <= 0 then return 0 end
  for one = used.f, used.l, 64 do
    local names, last = {}, math.min(one + 63, used.l)
    for each = one, last do names[#names + 1] = kind .. each % RING end
    for place, value in ipairs(redis.call('HMGET', used.key, unpack(names))) do
      over = over - number(value)
      if over <= 0 then return (one + place + LIVE) * BUCKET - now end
    end
  end
  return 60000
end

local function view(used) return {used.s, used.r, used.t, used.u, used.z} end

-- May a request begin?  Tokens are -1 where none count, and a limit is -1 where there is none.
local function ask(client, tokens, streams, requests, minute, day)
  local used, longest, limit = load(client), 0, 0
  local function refuse(which, milliseconds)
    if milliseconds > 0 and milliseconds >= longest then longest, limit = milliseconds, which end
  end
  if streams >= 0 and used.s >= streams then refuse(1, 1000) end
  if requests >= 0 and used.r >= requests then refuse(2, wait(used, used.r + 1 - requests, 'q')) end
  if tokens >= 0 and minute >= 0 and used.t + tokens > minute then
    refuse(3, wait(used, used.t + math.min(tokens, minute) - minute, 'k'))
  end
  if tokens >= 0 and day >= 0 then
    local least = math.min(tokens, day)
    if used.u + least > day then
      refuse(4, used.z + least <= day and 1000 or (today + 1) * 86400000 - now)
    end
  end
  if limit == 0 then
    tokens = math.max(0, tokens)
    add(used, bucket, 1, tokens)
    used.u = used.u + tokens
    hold(client, used, 1)
  end
  save(used)
  return {limit, longest, bucket, today, view(used)}
end

-- Something has come or gone, whatever the limits are.
local function put(client, streams, requests, at, tokens, day, spent, settled)
  local used = load(client)
  if requests ~= 0 or tokens ~= 0 then add(used, at, requests, tokens) end
  if day == today then used.u, used.z = math.max(0, used.u + spent), used.z + settled end
  if streams ~= 0 then hold(client, used, streams) end
  save(used)
  return {view(used)}
end

local function look(client)
  local used = load(client)
  save(used)
  return {view(used)}
end

-- So many tokens at least were settled on a day, as a process knows.
local function spent(client, day, tokens)
  local used = load(client)
  if day == today and used.z < tokens then
    used.u, used.z = used.u + tokens - used.z, tokens
  end
  save(used)
  return {view(used)}
end

-- Let all processes hear of something.
local function tell(text)
  local number = redis.call('INCR', prefix .. 'told')
  redis.call('ZADD', prefix .. 'events', number, string.format('%.0f %s %s', now, process, text))
  redis.call('ZREMRANGEBYSCORE', prefix .. 'events', '-inf', number - EVENTS)
  return 0
end

-- Return what was told behind a number, and the last number: how long ago it was, by whom, and what.
local function hear(behind)
  local last, found = number(redis.call('GET', prefix .. 'told')), {}
  if last > behind then
    local events = redis.call('ZRANGEBYSCORE', prefix .. 'events', '(' .. behind, '+inf', 'LIMIT', 0, HEARD, 'WITHSCORES')
    for place = 1, #events, 2 do
      local at, who, text = string.match(events[place], '^(%d+) (%S+) (.*)$')
      found[#found + 1] = {now - tonumber(at), who, text}
      behind = tonumber(events[place + 1])
    end
    if #found < HEARD then behind = last end
  end
  return math.min(behind, last), found
end

local function stick(key, provider, milliseconds)
  redis.call('SET', prefix .. 's:' .. key, provider, 'PX', milliseconds)
  return 0
end

local function stuck(key) return redis.call('GET', prefix .. 's:' .. key) or '' end

-- How many of a provider's places may a process have?  By the weights of those who want some; nobody who has got
-- some loses one that is busy.
local function claim(provider, most, busy, waiting, weight)
  local key = prefix .. 'p:' .. provider
  local all, held, wants = redis.call('HGETALL', key), 0, {{busy + waiting, weight}}
  for place = 1, #all, 2 do
    if all[place] ~= process then
      if number(redis.call('ZSCORE', procs, all[place])) <= now then
        redis.call('HDEL', key, all[place])
      else
        local has, uses, more, heavy = string.match(all[place + 1], '^(%d+) (%d+) (%d+) (%d+)$')
        held = held + has
        wants[#wants + 1] = {uses + more, tonumber(heavy)}
      end
    end
  end
  local left, weights, part = most, 0, nil
  for _, one in ipairs(wants) do weights = weights + one[2] end
  local is_content = true
  while is_content and weights > 0 do
    local share = left / weights
    is_content = false
    for _, one in ipairs(wants) do
      if one[2] > 0 and one[1] <= share * one[2] then
        left, weights, is_content = left - one[1], weights - one[2], true
        one[2] = 0
      end
    end
  end
  if wants[1][2] == 0 then
    part = busy + waiting
  else
    part = math.ceil(left / weights * weight - 1e-9)
  end
  part = math.max(0, math.min(part, most - held))
  redis.call('HSET', key, process, string.format('%.0f %.0f %.0f %.0f', math.max(part, busy), busy, waiting, weight))
  redis.call('EXPIRE', key, KEEP)
  return part
end

-- Take the streams of a process from the sums; return what its last call was, and said.
local function leave(gone)
  local key = prefix .. 'of:' .. gone
  local all, words = redis.call('HGETALL', key), {}
  for place = 1, #all, 2 do
    if all[place] == '' or all[place] == '=' then
      words[#words + 1], words[#words + 2] = all[place], all[place + 1]
    else
      local client = prefix .. 'c:' .. all[place]
      local left = redis.call('HINCRBY', client, 's', -number(all[place + 1]))
      if left < 0 then redis.call('HSET', client, 's', 0) end
    end
  end
  redis.call('DEL', key)
  redis.call('ZREM', procs, gone)
  return key, words
end

local does = {ask, put, look, spent, tell, stick, stuck, claim}

local born = redis.call('GET', prefix .. 'born')
if not born then
  born = tostring(now)
  redis.call('SET', prefix .. 'born', born)
end
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', procs, '-inf', now, 'LIMIT', 0, 2)) do
  local key, words = leave(gone)
  if #words > 0 then
    redis.call('HSET', key, unpack(words))
    redis.call('EXPIRE', key, KEEP)
  end
end

local function head(word, figure) return cmsgpack.pack({word, figure, born, now}) end

if call < 0 then
  leave(process)
  return {head('left', 0)}
end
local last, said = unpack(redis.call('HMGET', held, '', '='))
last = tonumber(last)
local lives = last and redis.call('ZSCORE', procs, process)
if call == 0 then  -- what became of the call that it sent last?  If nothing, then nothing will: it may be on its way
  local sent = tonumber(ARGV[4])
  local is_done = last == sent and said ~= ''
  if last and last < sent then redis.call('HSET', held, '', sent, '=', '') end
  if lives then redis.call('ZADD', procs, now + lease, process) end
  return {head(lives and 'lives' or 'unknown', is_done and 1 or 0), is_done and said or ''}
end
if not lives and ARGV[5] ~= '1' then return {head('unknown', 0)} end
if last and call <= last then return {head('again', last)} end
redis.call('ZADD', procs, now + lease, process)
local results = {}
for place, op in ipairs(cmsgpack.unpack(ARGV[4])) do
  results[place] = does[op[1]](unpack(op, 2))
end
results = cmsgpack.pack(results)
redis.call('HSET', held, '', call, '=', results)
redis.call('EXPIRE', held, KEEP)
local heard, events = hear(tonumber(ARGV[6]))
local lived = redis.call('ZCOUNT', procs, '(' .. now, '+inf')
return {cmsgpack.pack({'done', lived, born, now, heard, events}), results}
