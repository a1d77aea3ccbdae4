"""Arguments of `twinfer bench serve`: a load on a running server, ours or any with OpenAI's routes."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", "--url", default="http://127.0.0.1:8000", help="[http://127.0.0.1:8000]")
    server.add_argument("--model", metavar="TEXT", help="model to ask for (default: the server's first)")
    server.add_argument("--api-key", metavar="TEXT", help="key; better given as TWINFER_API_KEY")
    server.add_argument(
        "--endpoint-type", choices=("openai", "openai-chat"), default="openai", help="completions or chat [openai]"
    )
    data = parser.add_argument_group("dataset")
    data.add_argument("--dataset-name", choices=("random", "custom"), default="random", help="[random]")
    data.add_argument("--dataset-path", metavar="FILE", help="jsonl of the custom dataset")
    data.add_argument("--num-prompts", type=int, default=100, metavar="N", help="[100]")
    data.add_argument("--random-input-len", type=int, default=128, metavar="N", help="[128]")
    data.add_argument(
        "--random-output-len", type=int, default=64, metavar="N", help="[64]; custom rows without their own"
    )
    data.add_argument("--random-range-ratio", type=float, default=0.0, metavar="X", help="spread of lengths [0]")
    data.add_argument("--random-prefix-len", type=int, default=0, metavar="N", help="tokens shared by all prompts [0]")
    data.add_argument("--disable-shuffle", action="store_true", help="custom rows in file order")
    data.add_argument("--seed", type=int, default=0, metavar="N", help="[0]")
    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", type=float, default=float("inf"), metavar="X", help="requests per second [inf]")
    load.add_argument("--burstiness", type=float, default=1.0, metavar="X", help="1 = Poisson, less = burstier [1]")
    load.add_argument("--max-concurrency", type=int, metavar="N", help="most requests at once")
    load.add_argument("--num-warmups", type=int, default=1, metavar="N", help="requests before the clock starts [1]")
    load.add_argument("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="[true]")
    load.add_argument("--extra-body", metavar="JSON", help="further fields of every request")
    result = parser.add_argument_group("result")
    result.add_argument(
        "--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="LIST", help="[ttft,tpot,itl,e2el]"
    )
    result.add_argument("--metric-percentiles", default="50,90,99", metavar="LIST", help="[50,90,99]")
    result.add_argument("--save-result", action="store_true", help="write a JSON file")
    result.add_argument("--save-detailed", action="store_true", help="and every request's own times")
    result.add_argument("--result-dir", default=".", metavar="DIR", help="[.]")
    result.add_argument("--result-filename", metavar="FILE", help="[twinfer-RATEqps-MODEL-TIME.json]")


def run(args: argparse.Namespace) -> int:
    from engine.entrypoints.bench_serve import bench_serve

    return bench_serve(args)
