"""What replicas ask of a cluster, and what is refused because no cluster of these nodes could give it."""

from __future__ import annotations

from typing import Any

import pytest

from mm.errors import InvalidOption
from serve.config import ServeConfig
from serve.deployments.placement import Demand, Node, demands, label_fits, problem

HEAD = Node(total={"CPU": 4.0}, free={"CPU": 4.0}, labels={"zone": "a"})


def gpu_node(kind: str, num_gpus: float = 1.0, free: float | None = None) -> Node:
    total = {"CPU": 4.0, "GPU": num_gpus, f"accelerator_type:{kind}": 1.0}
    return Node(total=total, free=total | ({} if free is None else {"GPU": free}), labels={"zone": "b"})


def options(nodes: list[Node], **settings: Any) -> dict[str, dict[str, Any]]:
    from mm.settings import build

    return {one.stage: dict(one.options) for one in demands(build(ServeConfig, settings, "serve"), nodes)}


def refusal(nodes: list[Node], **settings: Any) -> str | None:
    from mm.settings import build

    return problem(demands(build(ServeConfig, settings, "serve"), nodes), nodes)


@pytest.mark.parametrize(
    ("device", "nodes", "shares"),
    [
        ("cpu", [gpu_node("T4")], (0, 0)),
        ("auto", [HEAD], (0, 0)),
        ("auto", [HEAD, gpu_node("T4")], (0.25, 0.75)),
        ("cuda", [HEAD], (0.25, 0.75)),
    ],
)
def test_replicas_ask_for_gpus_without_being_told(device, nodes, shares):
    found = options(nodes, device=device)
    assert (found["encoder"]["num_gpus"], found["decoder"]["num_gpus"]) == shares
    assert "num_gpus" not in found["ingress"]


def test_a_stage_that_may_only_run_where_no_gpu_is_asks_for_none():
    found = options([HEAD, gpu_node("T4")], device="auto", encoder_labels=("zone=a",))
    assert (found["encoder"]["num_gpus"], found["decoder"]["num_gpus"]) == (0, 0.75)
    assert found["encoder"]["label_selector"] == {"zone": "a"}


def test_a_share_that_is_given_counts():
    found = options([gpu_node("T4")], device="auto", encoder_gpus=0.0, decoder_gpus=2.0)
    assert (found["encoder"]["num_gpus"], found["decoder"]["num_gpus"]) == (0, 2)
    with pytest.raises(InvalidOption, match="cuda:1"):
        options([gpu_node("T4", 2)], device="cuda:1")


@pytest.mark.parametrize(
    ("nodes", "settings", "said"),
    [
        ([HEAD], {}, None),
        ([HEAD, gpu_node("T4")], {"device": "auto"}, None),
        ([HEAD], {"device": "cuda"}, "no node of the cluster has 0.5 CPU and 0.75 GPU for the decoder"),
        ([HEAD, gpu_node("T4")], {"device": "auto", "decoder_accelerator_type": "H100"}, "a GPU of type H100"),
        ([HEAD, gpu_node("T4")], {"encoder_labels": ("zone=c",)}, "the label zone=c"),
        ([HEAD, gpu_node("T4", 2)], {"device": "auto", "num_decoders": 3, "decoder_gpus": 0.6}, "have room for 2"),
        ([HEAD, gpu_node("T4")], {"device": "auto", "num_encoders": 2}, "need 1.25 GPU"),
        ([HEAD, gpu_node("T4", free=0.5)], {"device": "auto"}, "have room for 0"),
        ([HEAD], {"num_decoders": 20}, "have room for 8"),
        ([HEAD], {"num_decoders": 3, "max_decoders_per_node": 2}, "have room for 2"),
        ([HEAD, gpu_node("T4")], {"num_decoders": 3, "max_decoders_per_node": 2}, None),
    ],
)
def test_what_no_node_could_hold_is_said_in_one_line(nodes, settings, said):
    found = refusal(nodes, **settings)
    assert (found is None) if said is None else said in str(found), found
    assert "\n" not in (found or "")


def test_exactly_full_is_not_too_full():
    """Sums of shares are not exact: 0.1 + 0.2 > 0.3."""
    one = Demand(stage="a", num_replicas=10, options={"num_cpus": 0.1, "num_gpus": 0.1})
    node = Node(total={"CPU": 1.0, "GPU": 1.0}, free={"CPU": 0.1 * 3 + 0.7 - 1e-12, "GPU": 1.0 - 1e-12})
    assert problem([one], [node]) is None


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give another --app-name"),
        ({"app_name": "b"}, "'mm' answers at / already; give another --route-prefix, such as /b"),
        ({"app_name": "b", "route_prefix": "/b"}, None),
        ({"app_name": "b", "route_prefix": "/b", "port": 8001}, None),
        ({"app_name": "b", "route_prefix": "/b", "port": 8002}, "leave --port out"),
    ],
)
def test_what_runs_on_a_cluster_is_left_alone(settings, said):
    from serve.deployments.cluster import ClusterUnusable, Running, check_free

    there = Running(host="127.0.0.1", port=8001, routes={"mm": "/"})
    if said is None:
        check_free(there, ServeConfig(**settings))
        return
    with pytest.raises(ClusterUnusable, match=said):
        check_free(there, ServeConfig(**settings))


def test_a_decoder_on_several_gpus_asks_for_all_of_them():
    found = options([gpu_node("T4", 4)], device="cuda", tensor_parallel=2)
    assert (found["encoder"]["num_gpus"], found["decoder"]["num_gpus"]) == (0.25, 2)
    assert options([HEAD], device="cpu", tensor_parallel=2)["decoder"]["num_gpus"] == 0
    with pytest.raises(InvalidOption, match="takes 4 GPUs of one node"):
        options([gpu_node("T4", 4)], device="cuda", tensor_parallel=4, decoder_gpus=2.0)
    assert "no node of the cluster has" in str(refusal([gpu_node("T4", 2)], device="cuda", tensor_parallel=4))
    with pytest.raises(InvalidOption, match="cannot move to another replica"):
        options([gpu_node("T4", 4)], device="cuda", tensor_parallel=2, split="epd")


@pytest.mark.parametrize(
    ("wanted", "has", "fits"),
    [
        ("b", "b", True),
        ("b", None, False),
        ("!b", "b", False),
        ("!b", None, True),
        ("in(a, b)", "b", True),
        ("in(a)", "b", False),
        ("!in(a,b)", "c", True),
    ],
)
def test_labels_are_read_as_ray_reads_them(wanted, has, fits):
    assert label_fits(wanted, has) is fits


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("address", "ray://10.0.0.4:10001"),
        ("address", "10.0.0.4"),
        ("app_name", ""),
        ("route_prefix", "tiny"),
        ("route_prefix", "/tiny/"),
        ("encoder_labels", ("zone",)),
        ("encoder_gpus", 1.5),
        ("deployment_prefix", "a b"),
        ("max_encoders_per_node", 0),
    ],
)
def test_what_ray_would_refuse_later_is_refused_at_once(name, given):
    with pytest.raises(InvalidOption, match=name):
        ServeConfig(**{name: given})
