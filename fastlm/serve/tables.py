"""Define the tables of the feedback database.

`fastlm_measurements` has numbers about every answer, with or without consent to store its text;
`fastlm.serve.monitor` writes and reads them. The tables of a canary have no text either: they say
which model gave which answer, and the outcome of each conversation.
"""

import sqlalchemy as sa

LOCK = 0x666173746C6D  # key of PostgreSQL's advisory lock: "fastlm"
metadata = sa.MetaData()
RESPONSES = sa.Table(
    "fastlm_responses",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("response_id", sa.String(128), nullable=False, unique=True),
    sa.Column("conversation_id", sa.String(128), index=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("prompt", sa.Text, nullable=False),  # JSON: messages
    sa.Column("tools", sa.Text),  # JSON: a list
    sa.Column("choices", sa.Text, nullable=False),  # JSON: per choice the messages of the answer
    sa.Column("num_choices", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Text, nullable=False),  # ISO 8601, UTC
)
FEEDBACK = sa.Table(
    "fastlm_feedback",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("response_id", sa.String(128), index=True),
    sa.Column("conversation_id", sa.String(128), index=True),
    sa.Column("choice", sa.Integer, nullable=False),
    sa.Column("rater", sa.String(128)),
    sa.Column("thumb", sa.String(4)),  # up, down
    sa.Column("comment", sa.Text),
    sa.Column("corrected", sa.Text),
    sa.Column("preferred_over", sa.Text),  # JSON: [[response_id, choice], ...]
    sa.Column("ranking", sa.Text),  # JSON: fields of `fastlm.serve.feedback.Ranking`; {}: skipped
    sa.Column("metrics", sa.Text),  # JSON: {name: number}
    sa.Column("created_at", sa.Text, nullable=False),
)
RATINGS = sa.Table(  # `fastlm.serve.ratings.Rating`
    "fastlm_metrics",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("better", sa.String(16), nullable=False),
    sa.Column("level", sa.String(16), nullable=False),
    sa.Column("low", sa.Float, nullable=False),
    sa.Column("high", sa.Float, nullable=False),
)
MEASUREMENTS = sa.Table(
    "fastlm_measurements",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("response_id", sa.String(128), index=True),
    sa.Column("conversation_id", sa.String(128), index=True),  # only with consent
    sa.Column("choice", sa.Integer, nullable=False),
    sa.Column("model", sa.String(256), nullable=False),
    sa.Column("at", sa.Float, nullable=False, index=True),  # seconds since 1970, at its end
    sa.Column("status", sa.Integer, nullable=False),  # HTTP status; 499: the client disconnected
    sa.Column("finish_reason", sa.String(16)),
    sa.Column("queue_seconds", sa.Float),
    sa.Column("first_token_seconds", sa.Float),
    sa.Column("seconds", sa.Float),
    sa.Column("prompt_tokens", sa.Integer),
    sa.Column("new_tokens", sa.Integer),
    sa.Column("refusal", sa.Float),  # scores of the judge in the next column
    sa.Column("refusal_judge", sa.String(64)),
    sa.Column("toxicity", sa.Float),
    sa.Column("toxicity_judge", sa.String(64)),
    sa.Column("features", sa.LargeBinary),  # `fastlm.serve.monitor.features`
)
WITHDRAWN = sa.Table(  # keys of `fastlm.data.forget_log` of deleted rows
    "fastlm_withdrawals",
    metadata,
    sa.Column("key", sa.String(96), primary_key=True),
    sa.Column("request_key", sa.String(96), primary_key=True),  # hash of the deleted id
    sa.Column("withdrawn_at", sa.Text, nullable=False),  # ISO 8601, UTC
)
CANARY_ANSWERS = sa.Table(
    "fastlm_canary_answers",
    metadata,
    sa.Column("response_id", sa.String(160), primary_key=True),
    sa.Column("experiment", sa.String(64), nullable=False, index=True),
    sa.Column("unit", sa.String(64), nullable=False, index=True),  # a keyed hash
    sa.Column("conversation_id", sa.String(128), index=True),
    sa.Column("arm", sa.String(4), nullable=False),  # old, new
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("assigned", sa.Boolean, nullable=False),  # by the hash, not by the client
    sa.Column("error", sa.Boolean, nullable=False),
    sa.Column("seconds_per_token", sa.Float),
    sa.Column("at", sa.Float, nullable=False),  # seconds since 1970
)
CANARY_OUTCOMES = sa.Table(
    "fastlm_canary_outcomes",
    metadata,
    sa.Column("experiment", sa.String(64), primary_key=True),
    sa.Column("unit", sa.String(64), primary_key=True),
    sa.Column("arm", sa.String(4), nullable=False),
    sa.Column("success", sa.Boolean, nullable=False),
    sa.Column("response_id", sa.String(128)),
)


def create_missing(engine: sa.Engine) -> None:
    """Create missing tables. Servers that start at the same time wait for each other."""
    if engine.dialect.name != "sqlite":
        with engine.begin() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")
            metadata.create_all(connection)
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(
            "BEGIN IMMEDIATE"
        )  # otherwise the transaction starts at the first write
        try:
            metadata.create_all(connection)
            connection.exec_driver_sql("COMMIT")
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
