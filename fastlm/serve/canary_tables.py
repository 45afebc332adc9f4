"""The tables of a canary: which model gave which answer, and what became of each
conversation. No text of a prompt or an answer.
"""

import secrets
from collections.abc import Iterable

import sqlalchemy as sa

metadata = sa.MetaData()
ANSWERS = sa.Table(
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
    sa.Column("pace", sa.Float),  # seconds per token
    sa.Column("at", sa.Float, nullable=False),  # seconds since 1970
)
OUTCOMES = sa.Table(
    "fastlm_canary_outcomes",
    metadata,
    sa.Column("experiment", sa.String(64), primary_key=True),
    sa.Column("unit", sa.String(64), primary_key=True),
    sa.Column("arm", sa.String(4), nullable=False),
    sa.Column("success", sa.Boolean, nullable=False),
    sa.Column("response_id", sa.String(128)),
)


def make_nameless(connection: sa.Connection, ids: Iterable[str]) -> int:
    """Forget responses and conversations: what they count for stays, under ids that say nothing.
    Return how many answers there were.
    """
    if not sa.inspect(connection).has_table(ANSWERS.name):  # no trial was ever here
        return 0
    found, a = 0, ANSWERS.c
    for id in ids:
        its = sa.or_(a.response_id.in_((id, f"refused-{id}")), a.conversation_id == id)
        units = connection.execute(sa.select(a.experiment, a.unit).where(its).distinct()).all()
        for experiment, unit in units:
            new = secrets.token_hex(32)
            for table in (ANSWERS, OUTCOMES):
                of = sa.and_(table.c.experiment == experiment, table.c.unit == unit)
                connection.execute(table.update().where(of).values(unit=new))
        for response in connection.execute(sa.select(a.response_id).where(its)).scalars().all():
            new = f"forgotten-{secrets.token_hex(16)}"
            nameless = {"response_id": new, "conversation_id": None}
            connection.execute(ANSWERS.update().where(a.response_id == response).values(nameless))
            said = OUTCOMES.update().where(OUTCOMES.c.response_id == response)
            connection.execute(said.values(response_id=None))
            found += 1
    return found
