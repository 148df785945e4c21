"""Functions for CVAT's SDK and its agents; users import them from `sam_poll.cvat`.

- `function`: auto-annotation. `interactor`: a mask from clicks and a box.
- `boxes`: the boxes and points that a function segments. `common`: what the functions share.
"""
