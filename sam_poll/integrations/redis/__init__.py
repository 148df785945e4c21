"""Jobs through Redis: a stream with acknowledgements, or Waikato's publish/subscribe channels.

- `stream`: the job source of a stream. It consists of `consumer_group` (the commands, with
  `scripts`), `entry_reader` (which entry is next, takeover from dead workers), `held_entries` and
  `lease_keeper` (what keeps entries from being taken over).
- `pubsub`: the job source of a channel.
- `messages`: requests and answers as bytes.
- `connection`, `scheme`: URL, client and errors; whether a server uses TLS.
- `service`: start and stop of the command.
"""
