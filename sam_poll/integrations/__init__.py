"""Other systems that send jobs and receive results.

- `cvat`: tasks of a CVAT server, and functions for its SDK. `nuclio`: CVAT's serverless functions.
- `http`: the server of `sam-poll serve`. `ui`: the page of `sam-poll ui`.
- `redis`: jobs through Redis. `cluster`: one share, workers on many machines, with Dramatiq on
  Redis or RabbitMQ (`message_broker`, `rabbitmq`). `server`: what both have.
"""
