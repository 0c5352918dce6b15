"""The application is made of plain data by the one settings model, and the files that docs name can be used."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from mm.errors import InvalidOption
from mm.settings import build
from serve.config import ServeConfig

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]
EXAMPLES = Path(__file__).parents[2] / "demos" / "deploy"

with warnings.catch_warnings():  # Ray's own, while it is imported
    warnings.simplefilter("ignore")
    from serve.deployments import application
    from serve.deployments.accelerator import placed
    from serve.deployments.placement import Node


def deployments(app: Any, name: str = "other") -> dict[str, Any]:
    from ray.serve._private.build_app import build_app

    return {one.name: one for one in build_app(app, name=name).deployments}


def test_arguments_written_on_a_command_line_are_settings():
    config = application.application_config(
        {"model": "tiny", "num_encoders": "2", "max-num-seqs": "4", "keep_ratio": "0.5", "prefix_caching": "false"}
        | {"encoder_label": "zone=b kind=x", "lenient_reducers": "true", "max_decoders": "null"}
    )
    assert (config.num_encoders, config.model.max_num_seqs, config.model.keep_ratio) == (2, 4, 0.5)
    assert (config.model.prefix_caching, config.encoder_labels) == (False, ("zone=b", "kind=x"))
    assert (config.model.reducers.on_error, config.max_decoders) == ("keep_all", None)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"num_encodrs": 2}, "did you mean 'num_encoders'"),
        ({"num_encoders": "two"}, "has to be a whole number"),
        ({"num_encoders": 0}, "at least 1"),
        ({"port": 80}, "http_options.port"),
        ({"app_name": "b"}, "--name"),
        ({"encoders": 1, "num_encoders": 1}, "twice"),
    ],
)
def test_arguments_that_mean_nothing_are_refused_by_name(args, said):
    with pytest.raises(InvalidOption, match=said):
        application.application_config(args)


def test_settings_become_what_ray_places_by():
    node = Node(total={"CPU": 8.0, "GPU": 2.0}, free={"CPU": 8.0, "GPU": 2.0})
    settings = {"device": "auto", "num_encoders": 3, "deployment_prefix": "A", "max_encoders_per_node": 2}
    settings |= {"encoder_accelerator_type": "T4", "decoder_label": ["zone=b"], "decoder_gpus": 1.0}
    config = build(ServeConfig, settings, "serve")
    found = deployments(application.build_application(config, [node], {"RAY_SERVE_X": "1"}))
    assert set(found) == {"AEncoder", "ADecoder", "AIngress"}
    encoder, decoder = found["AEncoder"], found["ADecoder"]
    assert (encoder.num_replicas, encoder._replica_config.max_replicas_per_node) == (3, 2)
    asked = encoder.ray_actor_options
    assert (asked["accelerator_type"], asked.get("num_gpus", 0)) == ("T4", 0)  # no node with a T4 has a GPU
    assert decoder.ray_actor_options["label_selector"] == {"zone": "b"}
    assert decoder.ray_actor_options["num_gpus"] == 1
    assert all(one.ray_actor_options["runtime_env"]["env_vars"] == {"RAY_SERVE_X": "1"} for one in found.values())


def test_variables_are_the_settings_of_serve_build(monkeypatch):
    from ray._common.utils import import_attr

    monkeypatch.setenv("MM_ENCODERS", "3")
    monkeypatch.delenv("MM_PORT", raising=False)
    app = import_attr("serve.deployments.application:app")
    assert deployments(app)["Encoder"].num_replicas == 3
    with pytest.raises(AttributeError):
        import_attr("serve.deployments.application:nothing")


@pytest.mark.parametrize(
    ("device", "share", "has_cuda", "expected"),
    [
        ("cpu", 0.0, False, ("cpu", 1.0)),
        ("auto", 0.0, False, ("cpu", 1.0)),
        ("auto", 0.75, True, ("cuda", 0.75)),
        ("auto", 0.75, False, ("cpu", 1.0)),
        ("cuda", 0.25, True, ("cuda", 0.25)),
        ("cuda", 2.0, True, ("cuda", 1.0)),
    ],
)
def test_a_replica_computes_on_what_ray_gave_it(device, share, has_cuda, expected):
    config = placed(build(ServeConfig, {"device": device}, "serve"), share, has_cuda=has_cuda)
    assert (config.model.device, config.model.gpu_share) == expected


def applications(path: Path) -> list[dict[str, Any]]:
    """The Serve applications in a file for `serve deploy`, or in a RayService."""
    from ray.serve.schema import ServeDeploySchema

    with path.open(encoding="utf-8") as file:
        content = yaml.safe_load(file)
    if content.get("kind") == "RayService":
        assert content["apiVersion"] == "ray.io/v1"
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(content)
    return content["applications"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_setting_of_an_example_is_one(path):
    found = applications(path)
    assert found
    for one in found:
        assert one["import_path"] == "serve.deployments.application:build"
        application.application_config(one["args"])


def test_the_rayservice_has_a_group_of_nodes_for_each_stage():
    """Its replicas ask for labels and GPUs that its own worker groups have."""
    content = yaml.safe_load((EXAMPLES / "rayservice.yaml").read_text(encoding="utf-8"))
    (one,) = applications(EXAMPLES / "rayservice.yaml")
    config = application.application_config(one["args"])
    groups = {group["groupName"]: group for group in content["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    nodes = [
        Node(total=total, free=total, labels=group.get("labels", {}))
        for group in groups.values()
        for total in [{"CPU": 8.0, "GPU": float(_container(group)["resources"]["limits"].get("nvidia.com/gpu", 0))}]
        * group["replicas"]
    ]
    from serve.deployments.placement import demands, problem

    assert problem(demands(config, nodes), nodes) is None
    image = _container(content["spec"]["rayClusterConfig"]["headGroupSpec"])["image"]
    assert {_container(group)["image"] for group in groups.values()} == {image}


def _container(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]["containers"][0]


def test_the_dockerfile_starts_from_the_ray_that_is_pinned():
    constraints = (EXAMPLES.parents[1] / "constraints.txt").read_text(encoding="utf-8")
    pinned = next(line.split("==")[1] for line in constraints.splitlines() if line.startswith("ray=="))
    text = (EXAMPLES / "Dockerfile").read_text(encoding="utf-8")
    assert f"FROM rayproject/ray:{pinned}" in text
    assert f'rayVersion: "{pinned}"' in (EXAMPLES / "rayservice.yaml").read_text(encoding="utf-8")
