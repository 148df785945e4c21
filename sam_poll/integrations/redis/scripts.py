"""Lua scripts for steps on a stream that must happen whole or not at all; Redis runs them.

Each script first asks whose entry it is at present, which a MULTI transaction cannot: a worker that
was frozen, or cut off, finds its entry with another consumer and changes nothing. So an entry is
answered once, by its owner at that moment, and its answer and its acknowledgement are one step,
also in the server's append-only file.

Arguments of all scripts: KEYS[1] is the stream; ARGV[1] the group, ARGV[2] the consumer, ARGV[3] …
the entry or the entries.

Limitations: on a Redis Cluster the three streams must lie in one hash slot (`{sam}:in`,
`{sam}:out`).
"""

from __future__ import annotations

# Answer and acknowledge one entry.
#
# KEYS[2] is the stream of the answers, KEYS[3] that of the dead letters. ARGV[4]: "keep" leaves the
# entry in the stream. ARGV[5]: maximum number of answers kept, 0 for all. ARGV[6]: how many of the
# arguments that follow are fields of the dead letter (0: there is none); those come next, then the
# fields of the answer.
#
# Returns 1: done. 0: no consumer has this entry any more. -1: another consumer has it. 2: the group
# is lost; the answer was written nevertheless, because no other worker can write it.
#
# Where the memory is full, the entry is deleted first, which makes room for the answer: a script
# that has begun to write may go on beyond maxmemory. Otherwise a server full of entries would never
# have room again. Before that, XLEN finds out whether the answer would be refused for another
# reason, a value of another type under its name.
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

# Reset the idle time of those of the entries that are the consumer's. Returns the others.
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

# Assign the entry ARGV[3] to the consumer ARGV[4], as idle for ARGV[5] ms and delivered ARGV[6]
# times. Returns 1: done. 0: the entry was not the consumer's.
RELEASE = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2]) == 0 then return 0 end
redis.call(
  'XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, ARGV[3],
  'IDLE', ARGV[5], 'RETRYCOUNT', ARGV[6], 'JUSTID'
)
return 1
"""

# Remove the consumer from the group, unless it has pending entries, which would be lost with it.
# Returns 1: done. 0: it has some.
FORGET = """
if #redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2]) > 0 then return 0 end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return 1
"""
