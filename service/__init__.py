"""How models and scans are used: REST API, database, store, runs, registry, workers.

No torch and no trainer in here. In the order in which a request meets them: `app`, `envelope`,
`errors`, `routers`, `schemas`, `auth`, `idempotency`, `pagination`, `events`; what they stand on:
`volumes`, `datasets`, `runs`, `registry`, `storage`, `db`, `settings`; what works behind them:
`celery_app`, `worker`, `lease`, `tasks`, `upkeep`; what people start: `cli`, `stack`, `client`,
`demo`. docs/architecture.md says who calls what.
"""
