"""The page of `sam-poll ui`: watch the share, look at answers, click prompts, retry failures.

- `server`: start and stop of the command. `app`: the pages. `access`: who may see and change what.
- `share_index`: the one scanner of the share for all viewers. `live`: tells pages that it has news.
- `answers`: answers by folder, label, score and date. `pictures`: pictures and thumbnails.
- `editor`: prompts that are clicked, and uploads. `preview`: their masks before they are saved.
- `names`: names of the share in addresses. `doctor`: `sam-poll doctor` on demand.

Templates and scripts are in `sam_poll/data/ui`.
"""
