"""The CVAT side: prompts out of annotation files, tasks pushed, boxes of a task turned into masks, CVAT's functions.

What needs the package `cvat_sdk` (extra `cvat`) imports it inside. What can still go wrong here: the SDK must match
its server's version; a newer or older one may refuse what the other understands.
"""
