"""SAM over HTTP: requests become jobs of the pipeline, batched across clients.

- `app`, `openapi`: the endpoints and their description. `server`: start and stop of the command.
- `source`: the job source.
- `requests`, `responses`, `errors`: bodies in both directions.
- `auth`, `origin_check`, `connections`: which requests and connections are accepted.
"""
