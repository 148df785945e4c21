"""Many machines on one share: a dispatcher scans it, workers are called through Dramatiq.

- `dispatcher`: claims jobs on the share; `outbox` sends them and sends lost messages again.
- `worker`: the job source of a worker, whose method `answer` is the actor.
- `engine`: middleware that loads the engine and declares the actors; `messages` for them.
- `service`: start and stop of either; `actors`: a worker for the command `dramatiq`.
"""
