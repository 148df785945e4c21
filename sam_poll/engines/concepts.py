"""What engines that take concept requests, and those that take none, have in common. No torch."""

from __future__ import annotations

from sam_poll.core.errors import PromptError
from sam_poll.core.types import ConceptRequest
from sam_poll.core.validation import place, quoted
from sam_poll.engines import hub

# The models that take concept requests, as named in the `model:` setting.
MODELS = tuple(name for name, entry in hub.MODELS.items() if entry.family == "sam3")


def refusal(model: str, request: ConceptRequest) -> PromptError:
    """Return the error for a concept request to a model that takes none."""
    return PromptError(
        f"{model} takes no texts and exemplars: it segments what points and boxes show",
        place="text" if request.texts else "exemplars",
        remedy=f"load a model that takes them: {', '.join(MODELS)}, or a folder with its files",
    )


def too_long(request: ConceptRequest, index: int, tokens: int, most: int) -> PromptError:
    """Return the error for the text `index` of a request, which has more than `most` tokens."""
    text = request.texts[index]
    return PromptError(
        f"{quoted(text)} has {tokens} tokens, the model takes {most}",
        place=place(("text", index)) if len(request.texts) > 1 else "text",
        remedy="name what to find in fewer words; a word has one token or a few",
    )
