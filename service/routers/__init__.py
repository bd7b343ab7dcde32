"""The REST API, one resource a file.

volumes, datasets, runs, models, segmentations, embeddings, health: the routes. Between them:
`deps` (caller, session, answering once), `strict` (JSON bodies), `answers` (202 and waiting),
`inference` (what segmentations and embeddings share), `files` (downloads), `views` (rows as
schemas) and `docs` (what OpenAPI says about problems and files).
"""
