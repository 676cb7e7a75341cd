"""What KubeRay 1.7 refuses: the schemas and CEL rules of its CRDs, and rules that only its operator knows."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import yaml

Document = dict[str, Any]

_LONGEST_NAME = 47  # the operator appends to it
_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


class CustomResource:
    """One CRD of KubeRay: what the Kubernetes API server would say to an object of its kind.

    Args:
        path: the CRD's YAML file.
    """

    def __init__(self, path: Path) -> None:
        crd = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
        self._schema: Document = version["schema"]["openAPIV3Schema"]
        self.rules = sum(1 for _ in _all_rules(self._schema))
        self.scalable = "scale" in version.get("subresources", {})
        strict = _strict(self._schema)
        strict["properties"]["metadata"] = {"type": "object"}
        self._validator = jsonschema.Draft202012Validator(strict)
        self._cel = celpy.Environment()

    def errors(self, document: Document) -> list[str]:
        """Wrong types, missing and unknown fields by their place, and the messages of CEL rules that do not hold."""
        wrong = [f"{error.json_path}: {error.message[:200]}" for error in self._validator.iter_errors(document)]
        return wrong + [
            f"{place}: {rule['message']}"
            for place, value, rule in _rules(self._schema, document, "$")
            if not self._holds(rule["rule"], value)
        ]

    def _holds(self, rule: str, value: Any) -> bool:
        program = self._cel.program(self._cel.compile(rule))
        return bool(program.evaluate({"self": celpy.json_to_cel(value)}))


def _strict(schema: Any) -> Any:
    """A structural schema as JSON Schema in which an unknown field is an error (the server would drop it silently)."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(part) for key, part in schema.items()}
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


def _is_new(rule: Document) -> bool:
    """Whether a rule says anything about an object that is only being made."""
    return "oldSelf" not in rule["rule"]


def _all_rules(schema: Any) -> Iterator[Document]:
    if isinstance(schema, dict):
        yield from filter(_is_new, schema.get("x-kubernetes-validations", []))
        for part in schema.values():
            yield from _all_rules(part)


def _rules(schema: Document, value: Any, place: str) -> Iterator[tuple[str, Any, Document]]:
    """The rules that concern the parts of an object, each with that part."""
    for rule in filter(_is_new, schema.get("x-kubernetes-validations", [])):
        yield place, value, rule
    if isinstance(value, dict):
        for name, part in value.items():
            below = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(below, dict):
                yield from _rules(below, part, f"{place}.{name}")
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _rules(schema.get("items", {}), part, f"{place}[{number}]")


def operator_refuses(document: Document) -> list[str]:
    """What the operator itself refuses in a RayJob or RayCluster; only the rules that this project could break."""
    found, spec, is_job = [], document["spec"], document["kind"] == "RayJob"
    name = document["metadata"]["name"]
    if len(name) > _LONGEST_NAME or not _DNS_1035.fullmatch(name):
        found.append(f"name {name}")
    cluster = spec.get("rayClusterSpec", {}) if is_job else spec
    if is_job:
        found += _job_refused(spec)
        if not cluster:
            return [*found, "neither rayClusterSpec nor clusterSelector"]
    groups = [("head", cluster["headGroupSpec"])] + [(g["groupName"], g) for g in cluster["workerGroupSpecs"]]
    for group, content in groups:
        if not content["template"]["spec"]["containers"]:
            found.append(f"{group}: no container")
        if "labels" in content.get("rayStartParams", {}):
            found.append(f"{group}: rayStartParams.labels")
        if content.get("resources") and content.get("rayStartParams", {}).keys() & _RESOURCES:
            found.append(f"{group}: both resources and rayStartParams")
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split("."))
        if version < (2, 52, 0):
            found.append("authOptions.mode: token needs rayVersion 2.52 or later")
    return found


def _job_refused(spec: Document) -> list[str]:
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    sidecar, interactive = (spec.get("submissionMode") == mode for mode in ("SidecarMode", "InteractiveMode"))
    rules = {
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished")
        and not shuts_down,
        "suspend needs shutdownAfterJobFinishes": spec.get("suspend") and not shuts_down,
        "ttlSecondsAfterFinished is negative": spec.get("ttlSecondsAfterFinished", 0) < 0,
        "deletionStrategy excludes shutdownAfterJobFinishes": "deletionStrategy" in spec and shuts_down,
        "activeDeadlineSeconds must be positive": spec.get("activeDeadlineSeconds", 1) <= 0,
        "backoffLimit is negative": spec.get("backoffLimit", 0) < 0,
        "backoffLimit excludes InteractiveMode": interactive and spec.get("backoffLimit", 0) > 0,
        "SidecarMode takes no submitter": sidecar and spec.keys() & {"submitterPodTemplate", "submitterConfig"},
        "runtimeEnvYAML is no mapping": not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict),
    }
    return [rule for rule, broken in rules.items() if broken]
