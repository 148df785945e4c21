"""The steps on a stream that must happen whole or not at all, as scripts that Redis runs.

Each begins by asking whose the entry is now, which a MULTI cannot: a worker that was frozen, or cut off, finds its
entry with another one, and changes nothing. So an entry is answered once, by whoever it belongs to then, and its answer
and its acknowledgement are one step, also in the server's append-only file.

What can still go wrong here: on a Redis Cluster the three streams must lie in one slot (`{sam}:in`, `{sam}:out`).
"""

from __future__ import annotations

# All: KEYS[1] the stream; ARGV[1] the group, ARGV[2] the consumer, ARGV[3] … the entries, or the entry.

# → 1 done, 0 nobody has this entry any more, -1 another one has it, 2 the group was lost: the answer is written all the
# same, since nobody else can. KEYS[2] answers, KEYS[3] dead letters; ARGV[4] "keep" leaves the entry in the stream,
# ARGV[5] at most so many answers are kept (0: all), ARGV[6] how many of the fields that follow are the dead letter's
# (0: it is none), then those, then the answer's. Where the memory is full the entry's end comes first and makes the
# room, else a server full of entries would never have any again: a script that has begun to write may go on. What else
# could refuse the answer then (another kind of value under its name) is asked before; rights were.
FINISH = """
local owner = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
local lost = owner.err and string.find(owner.err, 'NOGROUP')
if owner.err and not lost then return owner end
if not lost then
  if #owner == 0 then return 0 end
  if owner[1][2] ~= ARGV[2] then return -1 end
end
local split = 6 + tonumber(ARGV[6])
local commands = {}
if split > 6 then
  local dead = {'XADD', KEYS[3], '*', unpack(ARGV, 7, split)}
  local found = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])
  if #found > 0 then
    for i = 1, math.min(#found[1][2], 2000) do dead[#dead + 1] = found[1][2][i] end
  end
  commands[1] = dead
end
local answer = {'XADD', KEYS[2]}
if ARGV[5] ~= '0' then
  answer[3], answer[4], answer[5] = 'MAXLEN', '~', ARGV[5]
end
answer[#answer + 1] = '*'
for i = split + 1, #ARGV do answer[#answer + 1] = ARGV[i] end
commands[#commands + 1] = answer
local function acknowledge()
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
  if ARGV[4] ~= 'keep' then redis.call('XDEL', KEYS[1], ARGV[3]) end
end
local first, acknowledged = redis.pcall(unpack(commands[1])), lost
if type(first) == 'table' and first.err then
  if lost or ARGV[4] == 'keep' or not string.find(first.err, '^-?OOM') then return first end
  for i = 1, #commands do redis.call('XLEN', commands[i][2]) end
  acknowledge()
  acknowledged = true
  redis.call(unpack(commands[1]))
end
if #commands > 1 then redis.call(unpack(commands[2])) end
if lost then return 2 end
if not acknowledged then acknowledge() end
return 1
"""

# Those of ARGV[3] … that are the consumer's are fresh again; the others are returned.
REFRESH = """
local lost = {}
for i = 3, #ARGV do
  if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2]) > 0 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""

# The entry ARGV[3] goes back: to the consumer ARGV[4], who is nobody, as idle for ARGV[5] ms and delivered ARGV[6]
# times. → 1 done, 0 it was not ours.
RELEASE = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, ARGV[3], 'IDLE', ARGV[5], 'RETRYCOUNT', ARGV[6], 'JUSTID')
return 1
"""

# A consumer that holds nothing is forgotten (with what it holds, its entries would be). → 1 done, 0 it holds some.
FORGET = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
"""
