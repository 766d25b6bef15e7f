"""`reelflow families`: the published networks that are files of data here."""

from rich.table import Table

from reelflow.cli.terminal import stdout

__all__ = ["families"]


def families() -> None:
    """List the published transformers. Size, clip, compression, licence of the weights, and where these are."""
    from reelflow.families.published import FAMILIES

    table = Table()
    for title in ("name", "parameters", "clip", "pixels to a latent", "channels", "weights", "licence"):
        table.add_column(
            title, overflow="fold", no_wrap=title == "name"
        )  # names are to be copied: whole, if on two lines
    for family in FAMILIES:
        for name, size in family.sizes.items():
            clip, stride, config = size.clip or family.clip, size.stride or family.stride, size.config
            extra = f" + {config.extra_channels}" if config.extra_channels else ""
            table.add_row(
                f"{family.name}.{name}",
                f"{size.parameters:,}",
                " x ".join(map(str, clip)),
                " x ".join(map(str, stride)),
                f"{config.in_channels}{extra}",
                size.repository or "not public",
                family.licence or "see there",
            )
    stdout().print(table)
    print(
        "What one costs:          reelflow plan NAME --frames 81 --height 480 --width 832\n"
        "A clip, by a system:     reelflow generate PROMPT --model FOLDER -o clip.mp4\n"
        "Into another layout:     reelflow convert FOLDER OUT --to diffusers\n"
        "In Python:               reelflow.load(FOLDER), reelflow.load_transformer(FOLDER), reelflow.load_vae(FOLDER)"
    )
