"""Types and helpers that every other package uses.

No module here depends on a network, on the layout of a share, or on a setting.

- `types`, `protocols`, `errors`: the data that travels, the interfaces of the seams, the exceptions
  with exit codes.
- `safe_root`, `safe_path`, `files`: files on a share that others write to, reached without
  following links.
- `text`, `base64_text`, `streams`, `yaml_reader`, `xml_reader`, `validation`: reading and showing
  text.
- `stats`, `alarms`: counters of a daemon, and conditions that an operator should know of;
  `telemetry`: both, and the heartbeats of its loops, in one object.
- `backoff`, `child_process`, `secret_files`: growing pauses, child processes, secrets in files.
- `distributions`: versions of installed packages; `missing_library`: the remedy for an import that
  failed because of a missing shared library.
"""
