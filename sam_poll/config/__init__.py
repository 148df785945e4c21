"""Settings, read once from defaults, `config.yaml`, the environment and flags, and checked.

- `settings`: the `Settings` dataclass, its sources and their order.
- `fields`: the kinds of values and how each is read from text.

Only `runtime`, `integrations`, `diagnostics` and `cli` import this package; everything below gets
values."""
