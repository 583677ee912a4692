"""The command tree. Bodies import what they need, so that `--help` stays quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.admin_app import Json, admin_app
from kvstore.cli.outcome import CommandFailed, ExitCode
from kvstore.errors import ConfigError, DiskUnusable, KvStoreError, ListenError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="A KV-cache store for LLM inference: fetch instead of recompute.",
)
app.add_typer(admin_app, name="admin")
bench_app = typer.Typer(help="Measure kvstore on this machine.")
app.add_typer(bench_app, name="bench")


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; returns its exit code after printing at most one line an error."""
    try:
        result = app(args=list(arguments), prog_name="kvstore", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "kvstore"
        message = " ".join(error.format_message().split())
        return _fail(f"{message} (see: {command} --help)", ExitCode.USAGE)
    except ConfigError as error:
        for problem in error.problems:
            _fail(problem, ExitCode.USAGE)
        return ExitCode.USAGE
    except CommandFailed as error:
        return _fail(str(error), error.exit_code)
    except KvStoreError as error:
        return _fail(str(error), ExitCode.USAGE if isinstance(error, ListenError | DiskUnusable) else ExitCode.PROBLEM)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        sys.stdout = None
        return ExitCode.OK
    except typer.Abort:
        return _fail("interrupted", ExitCode.INTERRUPTED)
    return result if isinstance(result, int) else ExitCode.OK


def _fail(message: str, code: ExitCode) -> ExitCode:
    print(f"kvstore: {message}", file=sys.stderr)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        from kvstore import __version__

        print(f"kvstore {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("sidecar", help="Run a node beside an engine: its misses and puts go to the nodes of --upstream.")
@app.command("serve", help="Run a node until SIGTERM. Prints one JSON line with its addresses when it is ready.")
def serve(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", envvar="KVSTORE_CONFIG", help="TOML file; flags and KVSTORE_* win.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="host:port or unix:/path; several with commas; port 0: any free one.")
    ] = None,
    bulk_listen: Annotated[
        str | None, typer.Option(help="Where objects move over bare sockets: auto, none, or addresses as --listen.")
    ] = None,
    node_id: Annotated[str | None, typer.Option(help="Name of this node (default: the host's).")] = None,
    host_capacity: Annotated[str | None, typer.Option(help='RAM for objects, such as "4GiB".')] = None,
    huge_pages: Annotated[bool | None, typer.Option(help="Keep objects in pages of 2 MiB.")] = None,
    disk_path: Annotated[Path | None, typer.Option(help="Directory of the disk tier (default: none).")] = None,
    disk_capacity: Annotated[str | None, typer.Option(help='Disk for objects, such as "100GiB".')] = None,
    disk_write: Annotated[str | None, typer.Option(help="behind, through or demote: when objects go to disk.")] = None,
    disk_admission: Annotated[str | None, typer.Option(help="all or second-use: which objects go to disk.")] = None,
    eviction_policy: Annotated[str | None, typer.Option(help="Which objects go first.")] = None,
    degrade_floor: Annotated[
        str | None, typer.Option(help="none, high, medium or low: how far cold objects shrink before any is evicted.")
    ] = None,
    soft_pin_share: Annotated[float | None, typer.Option(help="Of the largest tier, for pins with an end.")] = None,
    hard_pin_share: Annotated[float | None, typer.Option(help="Of the largest tier, for pins without an end.")] = None,
    object_bytes_max: Annotated[str | None, typer.Option(help="Largest object taken.")] = None,
    staged_bytes_max: Annotated[str | None, typer.Option(help="Puts in flight, all together.")] = None,
    stream_idle_s: Annotated[float | None, typer.Option(help="Seconds a put or fetch may make no progress.")] = None,
    lease_ms_max: Annotated[int | None, typer.Option(help="Longest lease granted.")] = None,
    shutdown_grace_s: Annotated[float | None, typer.Option(help="Seconds for calls in flight after SIGTERM.")] = None,
    metrics_listen: Annotated[
        str | None, typer.Option(help="host:port of the Prometheus endpoint (default: none).")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="This node's certificate (default: no TLS).")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Certificates that sign the clients', who need one then.")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help="redis://, rediss:// (TLS) or unix:// (default: none).")] = None,
    redis_cluster: Annotated[bool | None, typer.Option(help="redis_url names nodes of a Redis Cluster.")] = None,
    redis_password_file: Annotated[Path | None, typer.Option(help="File with Redis' password.")] = None,
    redis_ca: Annotated[
        Path | None, typer.Option(help="Certificates that sign Redis' (default: the system's).")
    ] = None,
    redis_cert: Annotated[Path | None, typer.Option(help="This node's certificate for Redis.")] = None,
    redis_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    redis_ttl_s: Annotated[int | None, typer.Option(help="Seconds an object outlives its last use.")] = None,
    redis_prefix: Annotated[str | None, typer.Option(help="First part of our keys in Redis.")] = None,
    redis_timeout_ms: Annotated[int | None, typer.Option(help="Longest wait for Redis.")] = None,
    redis_write: Annotated[str | None, typer.Option(help="off, behind or through.")] = None,
    upstream: Annotated[
        str | None, typer.Option(help="Nodes asked for what this one lacks: host:port, several with commas.")
    ] = None,
    upstream_timeout_ms: Annotated[int | None, typer.Option(help="Longest wait for a node upstream.")] = None,
    upstream_transport: Annotated[str | None, typer.Option(help="auto, grpc, tcp, unix or shm.")] = None,
    upstream_write: Annotated[str | None, typer.Option(help="off, behind or through.")] = None,
    upstream_tls_ca: Annotated[
        Path | None, typer.Option(help="Certificates that sign those upstream (default: no TLS to them).")
    ] = None,
    upstream_tls_cert: Annotated[Path | None, typer.Option(help="This node's certificate for nodes upstream.")] = None,
    upstream_tls_key: Annotated[Path | None, typer.Option(help="Its private key.")] = None,
    upstream_tls_name: Annotated[
        str | None, typer.Option(help="What certificates upstream are for (default: the host in --upstream).")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text, or json: one object a line.")] = None,
) -> None:
    from kvstore.cli.serve import serve_node

    flags = {
        "listen": listen, "bulk_listen": bulk_listen, "node_id": node_id,
        "host_capacity": host_capacity, "huge_pages": huge_pages,
        "disk_path": disk_path, "disk_capacity": disk_capacity, "disk_write": disk_write,
        "disk_admission": disk_admission, "eviction_policy": eviction_policy, "degrade_floor": degrade_floor,
        "soft_pin_share": soft_pin_share, "hard_pin_share": hard_pin_share,
        "object_bytes_max": object_bytes_max, "staged_bytes_max": staged_bytes_max,
        "stream_idle_s": stream_idle_s, "lease_ms_max": lease_ms_max, "shutdown_grace_s": shutdown_grace_s,
        "metrics_listen": metrics_listen, "tls_cert": tls_cert, "tls_key": tls_key,
        "tls_client_ca": tls_client_ca, "redis_url": redis_url, "redis_cluster": redis_cluster,
        "redis_password_file": redis_password_file, "redis_ca": redis_ca, "redis_cert": redis_cert,
        "redis_key": redis_key, "redis_ttl_s": redis_ttl_s, "redis_prefix": redis_prefix,
        "redis_timeout_ms": redis_timeout_ms, "redis_write": redis_write, "upstream": upstream,
        "upstream_timeout_ms": upstream_timeout_ms, "upstream_transport": upstream_transport,
        "upstream_write": upstream_write,
        "upstream_tls_ca": upstream_tls_ca, "upstream_tls_cert": upstream_tls_cert,
        "upstream_tls_key": upstream_tls_key, "upstream_tls_name": upstream_tls_name, "log_level": log_level,
        "log_format": log_format,
    }  # fmt: skip
    serve_node(config, flags, sidecar=context.info_name == "sidecar")


@app.command()
def demo(
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Where the model is kept between runs (default: ~/.cache/kvstore).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write everything measured to this file, as JSON.")
    ] = None,
    json: Json = False,
) -> None:
    """Prefill a real model in one process, decode in another, kill the node, go on; exit code 1 if anything is lost."""
    from kvstore.cli.demo import demo as run_demo

    raise typer.Exit(run_demo(cache or Path("~/.cache/kvstore/models").expanduser(), out, json))


@app.command()
def calibrate(
    model: Annotated[Path, typer.Option("--model", help="Folder of a Hugging Face causal LM, or a .gguf file.")],
    text: Annotated[list[Path], typer.Option("--text", help="Text file, or a folder of them; may be repeated.")],
    out: Annotated[Path, typer.Option("--out", help="Where the profile goes, such as profile.kvp.")],
    layers_per_group: Annotated[
        int, typer.Option("--layers-per-group", min=1, help="Consecutive layers that share a transform.")
    ] = 1,
    split_kv: Annotated[bool, typer.Option("--split-kv", help="Transform K and V apart (default: jointly).")] = False,
    no_gradients: Annotated[
        bool, typer.Option("--no-gradients", help="Weigh by forward passes with noise, one weight a layer's K or V.")
    ] = False,
    kind: Annotated[str, typer.Option("--kind", help="transform, diagonal or statistics.")] = "transform",
    target_kl: Annotated[float, typer.Option("--target-kl", help="Nats a token that quality medium may cost.")] = 1e-3,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of KV to learn from.")] = 28_000,
    passes: Annotated[
        int, typer.Option("--passes", min=1, help="Windows with a backward pass (with --no-gradients: 8 a window).")
    ] = 24,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of windows and sampled labels.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the model.")] = 1,
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder to go on from after an interruption (default: OUT.work).")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="In which the model is served: bfloat16, float16, float32; auto: its own.")
    ] = "auto",
    model_id: Annotated[
        str | None, typer.Option("--model-id", help="The layout's model, if not the folder's name.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="The layout's revision, if not the digest of the weights.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a codec profile of a model: smaller caches at equal loss. Goes on where it was interrupted."""
    from kvstore.calibrate.options import Options
    from kvstore.cli import calibrate as command

    options = Options(
        model=model, texts=tuple(text), out=out, layers_per_group=layers_per_group, split_kv=split_kv,
        gradients=not no_gradients, kind=command.kind_of(kind), target_kl=target_kl, tokens=tokens, passes=passes,
        seed=seed, threads=threads, work=work, dtype=command.dtype_of(dtype), model_id=model_id, revision=revision,
    )  # fmt: skip
    command.calibrate(options, json)


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Option("--model", help="Folder of a Hugging Face model, or a .gguf file.")],
    text: Annotated[list[Path], typer.Option("--text", help="A text, or a folder of .txt files; may be repeated.")],
    quality: Annotated[
        list[str] | None, typer.Option("--quality", help="May be repeated (default: all but raw).")
    ] = None,
    profile: Annotated[
        list[Path] | None, typer.Option("--profile", help="A calibrated profile; may be repeated.")
    ] = None,
    step: Annotated[list[float] | None, typer.Option("--step", help="Scales the base step; may be repeated.")] = None,
    chunk_tokens: Annotated[
        list[int] | None, typer.Option("--chunk-tokens", help="Tokens an object; may be repeated (default: 256).")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Other codecs beside ours.")] = True,
    documents: Annotated[int, typer.Option("--documents", min=1, help="Documents cut from the texts.")] = 8,
    prefix_tokens: Annotated[int, typer.Option("--prefix-tokens", min=16, help="Tokens that are stored.")] = 1536,
    tail: Annotated[int, typer.Option("--tail", min=0, help="Last tokens that the reader recomputes.")] = 64,
    turns: Annotated[int, typer.Option("--turns", min=0, help="Turns of the generation test; 0: without it.")] = 6,
    tasks: Annotated[bool, typer.Option(help="Retrieval questions.")] = True,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the cache: auto (as the weights are kept), bfloat16, float16, float32.")
    ] = "auto",
    model_id: Annotated[str | None, typer.Option("--model-id", help="Of the layout, as `calibrate` was told.")] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Of the layout, as `calibrate` was told.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the retrieval questions.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the model and the codec.")] = 1,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw loss against size (.png, .svg, .pdf).")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write everything to this file, as JSON.")] = None,
    json: Json = False,
) -> None:
    """Measure on your model what each quality costs in bits and in what the model says, beside other codecs."""
    from kvstore.cli import evaluate as cli
    from kvstore.evaluate.settings import QUALITIES, Settings

    cli.evaluate(
        Settings(
            model=model, texts=tuple(text), qualities=tuple(quality or QUALITIES), profiles=tuple(profile or ()),
            steps=tuple(step or (1.0,)), chunk_tokens=tuple(chunk_tokens or (256,)), baselines=baselines,
            documents=documents, prefix_tokens=prefix_tokens, tail=tail, turns=turns, tasks=tasks, seed=seed,
            threads=threads, dtype=dtype, model_id=model_id, revision=revision,
        ),
        plot, out, json,
    )  # fmt: skip


@bench_app.callback()
def bench() -> None:  # with a callback, a lone command keeps its name
    pass


@bench_app.command("trace")
def trace(
    file: Annotated[Path, typer.Argument(help="Requests as JSON lines with timestamp and hash_ids; .zst or plain.")],
    capacity: Annotated[
        list[str] | None,
        typer.Option("--capacity", help='"1%" of the unique blocks, or "10GiB"; may be repeated (1, 3, 10, 30 %).'),
    ] = None,
    policy: Annotated[list[str] | None, typer.Option("--policy", help="May be repeated (default: all).")] = None,
    block_bytes: Annotated[str, typer.Option("--block-bytes", help='Size of a block, such as "1MiB".')] = "",
    degrade: Annotated[bool, typer.Option("--degrade", help="Also let cold objects lose quality first.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw hit rates over capacity: .png, .svg, .pdf.")] = None,
    json: Json = False,
) -> None:
    """Replay a trace of requests: the hit rate of every eviction policy beside Belady's optimum."""
    from kvstore.cli import bench_trace
    from kvstore.policies.choice import POLICIES

    options = bench_trace.Options(
        capacities=tuple(capacity or bench_trace.CAPACITIES), policies=tuple(policy or POLICIES),
        block_bytes=block_bytes, degrade=degrade, plot=plot,
    )  # fmt: skip
    bench_trace.bench_trace(file, options, json)


@bench_app.command("codec")
def codec(
    kv: Annotated[
        Path | None,
        typer.Option("--kv", help="Real KV (.npy): bfloat16's bits as uint16, axes layers, 2, tokens, heads, dims."),
    ] = None,
    chunk_tokens: Annotated[int, typer.Option("--chunk-tokens", min=16, max=2048, help="Tokens an object.")] = 256,
    quality: Annotated[list[str] | None, typer.Option("--quality", help="May be repeated (default: all).")] = None,
    threads: Annotated[
        list[int] | None, typer.Option("--threads", min=1, help="Of the codec; may be repeated (default: 1 and 2).")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that each is measured.")] = 7,
    isa: Annotated[
        str | None, typer.Option("--isa", help="scalar, avx2 or avx512 (default: the best there is).")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("--profile", help="Of the KV's model: measure its qualities, and its transform, too.")
    ] = None,
    rope_theta: Annotated[
        float, typer.Option("--rope-theta", min=0, help="The model's; 0: keys are coded as they are.")
    ] = 100_000.0,
    json: Json = False,
) -> None:
    """Measure encode and decode against memcpy, and zstd, lz4 and constriction on the same symbols; exit code 1 if a
    round trip is wrong."""
    from kvstore.cli import bench_codec

    options = bench_codec.Options(
        chunk_tokens=chunk_tokens, qualities=tuple(quality or bench_codec.QUALITIES),
        threads=tuple(threads or bench_codec.THREADS), rounds=rounds, rope_theta=rope_theta or None, isa=isa,
        profile=profile,
    )  # fmt: skip
    bench_codec.bench_codec(kv, options, json)
