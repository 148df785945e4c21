"""Reading prompts in `in/`, to learn which picture their text names (`"image"`).

Limitations: a prompt is read once for that, and again only when its file is seen to have changed.
"""

from __future__ import annotations

from sam_poll.core.errors import PromptError
from sam_poll.core.safe_path import SafePath
from sam_poll.prompts import parser
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.deferred_jobs import DeferredJobs
from sam_poll.share.intake.next_scan import NextScan
from sam_poll.share.intake.pair_table import PairTable
from sam_poll.share.intake.stat_cache import StatCache
from sam_poll.share.layout import Layout, prompt_bytes


class PromptTexts:
    """Reads prompts, and tells the pair table which pictures they name. Used by one thread."""

    def __init__(
        self,
        layout: Layout,
        options: FolderOptions,
        files: StatCache,
        pairs: PairTable,
        deferred: DeferredJobs,
        next_scan: NextScan,
    ) -> None:
        self._layout, self._options = layout, options
        self._files, self._pairs = files, pairs
        self._deferred, self._next_scan = deferred, next_scan

    def read(self, prompt: SafePath) -> parser.PromptFile:
        """Read and parse a prompt file. Raises PromptError, OSError."""
        return self._options.parse(prompt_bytes(prompt, self._options.prompt_bytes))

    def learn(self, prompt: str, image: str | None) -> None:
        """Note which picture a prompt's text names; if any, the next scan is due at once."""
        self._pairs.learn(prompt, image)
        if image:
            self._next_scan.at_once()

    def learn_image(self, prompt: str) -> PromptError | None:
        """Read a prompt for the picture that its text names, if this scan has time for it.

        A prompt that is not complete or cannot be read is deferred. Returns the error of one that
        is to be rejected: as its text does not say which picture it wants, it would wait for ever.
        """
        if self._files.is_out_of_time():
            return None
        try:
            with self._files.counted():
                parsed = self.read(self._layout.input / prompt)
            self.learn(prompt, parsed.image)
        except PromptError as error:
            signatures = self._files.all_known([prompt])
            if not self._deferred.add_if_incomplete(prompt, signatures, error):
                return error
        except OSError as error:
            self._deferred.add_unread(prompt, self._files.all_known([prompt]), error)
        return None
