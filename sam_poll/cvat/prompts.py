"""`sam-poll cvat prompts`: an annotation file becomes prompt files beside their pictures."""
