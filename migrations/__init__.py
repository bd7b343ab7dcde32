"""The database's history: Alembic revisions, the same on SQLite and on PostgreSQL."""
