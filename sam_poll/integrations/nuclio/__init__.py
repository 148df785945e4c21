"""CVAT's functions on Nuclio: `handler` runs SAM, `proxy` forwards to `sam-poll serve`.

`requests`, `responses` and `errors` are what they receive and return; `answer_form` decides which
of its two forms an interactor's answer has.
"""
