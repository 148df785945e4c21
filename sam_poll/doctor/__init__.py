"""`sam-poll doctor`: what is wrong with this machine, this model, this share, each finding with its remedy.

What can still go wrong here: a finding is of its moment, and of the user who asks: a daemon that runs as another user,
or in a container, has other rights, other limits and another environment.
"""
