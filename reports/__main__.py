"""`python -m reports RUN_FOLDER …`: writes the page of each run folder again."""

from pathlib import Path

import click

from reports.render import render


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folders: tuple[Path, ...]) -> None:
    """Write report.html into each run folder and print its path."""
    for folder in folders:
        try:
            click.echo(render(folder))
        except OSError as error:
            raise click.ClickException(f"cannot write the report of {folder}: {error.strerror}") from error


if __name__ == "__main__":
    main()
