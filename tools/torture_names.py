"""Names that the torture's users and its writers agree on. No imports: a user's process has to be
light.
"""

BLOCKED = ("blocked1", "blocked2")
"""Folders of jobs whose places in out/, done/, failed/ and work/ the users may take."""
MARK = b"planted by a user"
"""In everything that a user plants; an answer with it was made of something that is no job."""
