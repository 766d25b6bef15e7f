"""`reelflow convert`: a transformer's weights from one layout to another."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from reelflow.cli.generate import adapter_use
from reelflow.cli.terminal import progress_bar

if TYPE_CHECKING:
    from reelflow.models.dit import DiTConfig

__all__ = ["convert"]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A folder or a safetensors file, in any layout.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    *,
    to: Annotated[Literal["diffusers", "original", "reelflow"], typer.Option(help="The layout to write.")],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Which published network it is, where weights do not tell (reelflow families)."
        ),
    ] = None,
    merge: Annotated[
        list[str] | None,
        typer.Option(metavar="[NETWORK=]FILE[:STRENGTH]", help="An adapter to add to the weights; may be repeated."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Cast to it [default: as stored].")
    ] = None,
) -> None:
    """Write a transformer's weights in another layout. Memory holds one file of the result; nothing is unpickled."""
    import torch

    from reelflow.families.adapters import load_adapter
    from reelflow.families.published import convert_transformer, export_transformer, find_transformer
    from reelflow.interop.checkpoints import AsOurs, check_empty

    cast = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype] if dtype else None
    check_empty(out)
    found = find_transformer(source, size=size)
    export = export_transformer(found.config, to, found.family)
    model, uses = found.empty(), [adapter_use(text) for text in merge or ()]
    adapters = [(load_adapter(use.file, model, network=use.network), use.strength) for use in uses]
    total = export.bytes_of(AsOurs(found.stored, found.rows).meta, cast)
    print(f"{source}: {_described(found.config)}, layout {found.layout}")
    print(f"{out}: layout {to}, {dtype or 'types as stored'}, {total / 1e9:.3g} GB")
    for use in uses:
        print(f"with {use.file} in strength {use.strength:g}")
    with progress_bar("weights", "MB") as show:
        convert_transformer(
            found,
            export,
            out,
            dtype=cast,
            adapters=adapters,
            progress=lambda done, whole: show(done // 10**6, whole // 10**6),
        )
    print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))}")


def _described(config: "DiTConfig") -> str:
    import torch

    from reelflow.families.published import sizes_of
    from reelflow.models.dit import VideoDiT

    with torch.device("meta"):
        parameters = sum(p.numel() for p in VideoDiT(config).parameters())
    return f"{' or '.join(sizes_of(config)) or 'no published size'}, {parameters:,} parameters"
