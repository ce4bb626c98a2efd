"""What the tests of the command line share."""

from typer.testing import CliRunner, Result

from t2l import cli


def t2l(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)
