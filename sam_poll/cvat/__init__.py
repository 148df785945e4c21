"""Short module paths for `cvat-cli --function-module`: `sam_poll.cvat.function`, `….interactor`.

Their files work with `--function-file`, too. The code is in `sam_poll.integrations.cvat.sdk`.
"""
