"""`sam-poll bench`: the naive loop, the whole daemon and the bare network side by side, on the user's own machine.

What can still go wrong here: a machine that others use meanwhile; the spread beside each figure tells.
"""
