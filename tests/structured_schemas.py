"""Two hundred JSON Schemas of the kinds that JSONSchemaBench collects: configurations of repositories, fragments of
Kubernetes, signatures of functions, events, articles, and what each keyword of the language does by itself.

Each kind is a function that draws one schema; the same ones come in every run. Texts are short and lists have few
items, so that a model that knows no JSON gets to an end.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

Schema = dict[str, Any]
Draw = Callable[[random.Random], Schema]

NUM_OF_KIND = 8
TEXT = """
account active address amount author balance batch body branch bucket cache category channel city client cluster
code color comment config count country created currency customer database date delay deploy device domain email
endpoint engine error event expires feature field file filter folder format gateway group height host image
index interval invoice item key label language latitude length level limit link list locale location longitude
mapping memory message metadata method metric mode model module month name namespace network node note number
object offset option order origin owner package page parent password path payload percent phone pipeline plan
platform policy port prefix price priority product profile project protocol provider quantity query queue rate
rating reason record region release replica report request resource result retry role route rule runtime sample
schedule schema scope score secret section segment server service session severity shape signal size slot
snapshot source stage state status step storage strategy stream subject suffix summary tag target task team
template tenant text threshold timeout timestamp title token topic total track trigger type unit update uri user
value variant vendor version volume warning webhook weight width window worker zone
"""
WORDS = TEXT.split()


class Case(NamedTuple):
    kind: str
    number: int
    schema: Schema
    is_compact: bool

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number}"


def draw_cases() -> list[Case]:
    """The same 200, of each kind as many; every other one is asked for without whitespace."""
    cases = []
    for kind, draw in KINDS.items():
        rng = random.Random(kind)
        cases += [Case(kind, number, draw(rng), is_compact=number % 2 == 0) for number in range(NUM_OF_KIND)]
    return cases


# --- parts ------------------------------------------------------------------------------------------------------------


def key(rng: random.Random) -> str:
    """In one of the styles in which people name things."""
    words = rng.sample(WORDS, rng.randint(1, 3))
    style = rng.randrange(4)
    if style == 0:
        return words[0] + "".join(word.title() for word in words[1:])
    return "_-."[style - 1].join(words)


def keys(rng: random.Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[key(rng)] = None
    return list(found)


def text(rng: random.Random) -> Schema:
    return {"type": "string", "maxLength": rng.randint(2, 10)}


def whole(rng: random.Random) -> Schema:
    least = rng.choice([0, 0, 1, -20, 100])
    return {"type": "integer", "minimum": least, "maximum": least + rng.choice([5, 99, 900, 65_535])}


def one_of_words(rng: random.Random) -> Schema:
    return {"enum": rng.sample(WORDS, rng.randint(2, 6))}


def flag(rng: random.Random) -> Schema:
    return {"type": "boolean"}


def value(rng: random.Random, depth: int = 1) -> Schema:
    """Something simple, or a small list or object of such things."""
    if depth and rng.random() < 0.3:
        return rng.choice([items, record])(rng, depth - 1)
    return rng.choice([text, whole, one_of_words, flag])(rng)


def items(rng: random.Random, depth: int = 0) -> Schema:
    return {"type": "array", "items": value(rng, depth), "maxItems": rng.randint(1, 3)}


def record(rng: random.Random, depth: int = 0) -> Schema:
    return closed({name: value(rng, depth) for name in keys(rng, rng.randint(1, 4))})


def closed(properties: dict[str, Any], optional: int = 0, **more: Any) -> Schema:
    """An object with these properties, of which the last `optional` may be missing."""
    required = list(properties)[: len(properties) - optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False, **more}


# --- kinds ------------------------------------------------------------------------------------------------------------


def repository(rng: random.Random) -> Schema:
    step = closed({"uses": {"enum": ["checkout@v4", "cache@v4"]}, "with": record(rng), "run": text(rng)}, optional=2)
    job = closed(
        {
            "runs-on": {"enum": ["ubuntu-latest", "macos-14", "windows-2022"]},
            "timeout-minutes": {"type": "integer", "minimum": 1, "maximum": rng.choice([60, 360])},
            "steps": {"type": "array", "items": step, "minItems": 1, "maxItems": 2},
        }
    )
    events = rng.sample(["push", "pull_request", "release", "schedule"], 3)
    on = {"type": "array", "items": {"enum": events}, "maxItems": 2}
    return closed({"name": text(rng), "on": on, "jobs": closed(dict.fromkeys(keys(rng, rng.randint(1, 2)), job))})


def kubernetes(rng: random.Random) -> Schema:
    name = {"type": "string", "pattern": "^[a-z][a-z0-9]{1,8}$"}
    quantity = {"type": "string", "pattern": "^[1-9][0-9]{0,2}(Mi|Gi|m)$"}
    port = {"type": "integer", "minimum": 1, "maximum": 65_535}
    resources = closed({"cpu": quantity, "memory": quantity})
    container = closed({"name": name, "image": name, "resources": closed({"limits": resources, "requests": resources})})
    ports = {"type": "array", "items": closed({"port": port, "targetPort": {"anyOf": [port, name]}}), "maxItems": 2}
    containers = {"type": "array", "items": container, "minItems": 1, "maxItems": 1}
    template = closed({"spec": closed({"containers": containers})})
    percent = {"type": "integer", "minimum": 1, "maximum": 100}
    probe = closed({"path": {"const": "/healthz"}, "port": port})
    scales = {"minReplicas": whole(rng), "maxReplicas": whole(rng), "targetCPUUtilizationPercentage": percent}
    specs: dict[str, Schema] = {
        "Service": closed({"type": {"enum": ["ClusterIP", "NodePort"]}, "ports": ports}),
        "Deployment": closed({"replicas": whole(rng), "template": template}),
        "HorizontalPodAutoscaler": closed(scales),
        "Probe": closed({"httpGet": probe, "periodSeconds": whole(rng), "failureThreshold": whole(rng)}),
    }
    kind = rng.choice(list(specs))
    version = {"const": rng.choice(["v1", "apps/v1", "autoscaling/v1"])}
    labels = closed({f"app.kubernetes.io/{label}": name for label in rng.sample(["name", "part-of", "version"], 2)})
    metadata = closed({"name": name, "namespace": name, "labels": labels}, optional=rng.randint(0, 2))
    return closed({"apiVersion": version, "kind": {"const": kind}, "metadata": metadata, "spec": specs[kind]})


def function_call(rng: random.Random) -> Schema:
    return closed({"name": {"const": key(rng)}, "arguments": record(rng, 1)})


def one_of_several_functions(rng: random.Random) -> Schema:
    return {"anyOf": [function_call(rng) for _ in range(rng.randint(2, 4))]}


def event(rng: random.Random) -> Schema:
    vendor, name = rng.sample(WORDS, 2)
    properties = {field: {**value(rng, 0), "description": f"The {field} of the {name}"} for field in keys(rng, 3)}
    uri = f"iglu:com.{vendor}/{name}/jsonschema/{rng.randint(1, 3)}-0-{rng.randint(0, 9)}"
    nullable = {"type": ["string", "null"], "maxLength": 6}
    return closed({"schema": {"const": uri}, "data": closed(properties | {"referrer": nullable}, optional=1)})


def article(rng: random.Random) -> Schema:
    element = {
        "anyOf": [
            closed({"type": {"const": "text"}, "content": text(rng)}),
            closed({"type": {"const": "image"}, "caption": text(rng), "width": whole(rng)}),
            closed({"type": {"const": "divider"}}),
        ]
    }
    identity = {"type": "string", "pattern": "^[A-Z0-9]{4}-[a-f0-9]{4}$"}
    headlines = closed({"basic": text(rng), "mobile": text(rng)}, optional=1)
    elements = {"type": "array", "items": element, "maxItems": rng.randint(1, 3)}
    body = {"type": {"const": "story"}, "_id": identity, "headlines": headlines, "content_elements": elements}
    return closed(body | {"canonical_url": {"type": "string", "pattern": "^/[a-z]{1,8}/$"}}, optional=rng.randint(0, 1))


def nested_arrays(rng: random.Random) -> Schema:
    schema: Schema = whole(rng)
    for _ in range(rng.randint(1, 4)):
        schema = {"type": "array", "items": schema, "minItems": rng.randint(0, 2), "maxItems": rng.randint(2, 3)}
    return closed({key(rng): schema})


def mixed_enums(rng: random.Random) -> Schema:
    pool = [None, True, False, 0, -1, 3.5, 10_000, "", "a b", "null", [1, 2], {"a": [None]}, *rng.sample(WORDS, 3)]
    return closed({name: {"enum": rng.sample(pool, rng.randint(2, 5))} for name in keys(rng, rng.randint(1, 3))})


def large_enum(rng: random.Random) -> Schema:
    names = {key(rng) for _ in range(rng.randint(100, 600))}
    return closed({"code": {"enum": sorted(names)}, "other": {"type": "string", "enum": rng.sample(WORDS, 60)}})


def tagged_union(rng: random.Random) -> Schema:
    tag, tags = key(rng), rng.sample(WORDS, rng.randint(2, 4))
    branches = [closed({tag: {"const": name}, f"{name}_{key(rng)}": value(rng, 1)}) for name in tags]
    return closed({"item": {"oneOf": branches}})


def any_of_types(rng: random.Random) -> Schema:
    types = rng.sample([text, whole, flag, items, record, lambda rng: {"type": "null"}], rng.randint(2, 4))
    return closed({name: {"anyOf": [draw(rng) for draw in types]} for name in keys(rng, rng.randint(1, 3))})


def definitions(rng: random.Random) -> Schema:
    names = rng.sample(WORDS, 3)
    defined = {name: value(rng, 1) for name in names}
    point = closed({axis: {"$ref": f"#/$defs/{rng.choice(names)}"} for axis in keys(rng, 2)})
    properties = {name: {"$ref": f"#/$defs/{rng.choice([*names, 'point'])}"} for name in keys(rng, 3)}
    return closed(properties, **{"$defs": defined | {"point": point}})


def recursion(rng: random.Random) -> Schema:
    """A tree, a list, or two that name each other."""
    name, child = keys(rng, 2)
    if rng.random() < 0.5:
        children = {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": rng.randint(1, 2)}
    else:
        children = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    return {"$ref": "#/$defs/node", "$defs": {"node": closed({name: one_of_words(rng), child: children})}}


PATTERNS = (
    "^#[0-9a-f]{6}$", r"^\+[1-9][0-9]{6,9}$", "^[A-Z]{2}-[0-9]{3}$", "^(0|[1-9][0-9]?)\\.(0|[1-9][0-9]?)\\.[0-9]$",
    "^(GET|PUT|POST)$", "^[a-z]+(-[a-z]+){1,2}$", "^[A-Z][a-z]{2,5} [A-Z][a-z]{2,5}$", "^v?[0-9]{1,3}(rc[0-9])?$",
    "^(cat|dog|bird)s?$", "^[01]{8}$", "^\\$[0-9]{1,4}\\.[0-9]{2}$", "^[^\\s@]{1,5}@[a-z]{1,5}\\.(com|org)$",
)  # fmt: skip


def patterns(rng: random.Random) -> Schema:
    chosen = rng.sample(PATTERNS, rng.randint(1, 3))
    return closed({name: {"type": "string", "pattern": chosen.pop()} for name in keys(rng, len(chosen))})


def formats(rng: random.Random) -> Schema:
    chosen = rng.sample(["date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration"], 2)
    return closed({name: {"type": "string", "format": chosen.pop()} for name in keys(rng, len(chosen))})


def ranges(rng: random.Random) -> Schema:
    least = rng.randint(-1000, 1000)
    bounds: list[Schema] = [
        {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 5000)},
        {"type": "integer", "exclusiveMinimum": least, "exclusiveMaximum": least + rng.randint(2, 50)},
        {"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": rng.choice([2, 5, 10])},
        {"type": "number", "minimum": 0, "maximum": rng.choice([1, 90, 180])},
        {"type": "number", "exclusiveMinimum": -1, "maximum": 0.5},
    ]
    return closed({name: bounds[rng.randrange(len(bounds))] for name in keys(rng, rng.randint(1, 3))})


def constants(rng: random.Random) -> Schema:
    deep = {name: [rng.randint(0, 9), None, {"text": rng.choice(WORDS)}] for name in keys(rng, 2)}
    chosen = rng.sample([deep, "", 'a "quoted" \\ text', "line\nbreak", 0, 1e3, -2.5, True, None, [], {}], 3)
    return closed({name: {"const": chosen.pop()} for name in keys(rng, len(chosen))})


def nullable(rng: random.Random) -> Schema:
    choices = [{"type": ["string", "null"], "maxLength": 5}, {"type": ["boolean", "null"]}]
    choices += [{"type": ["integer", "null"], "minimum": 0, "maximum": 50}, {"anyOf": [record(rng), {"type": "null"}]}]
    return closed({name: rng.choice(choices) for name in keys(rng, rng.randint(2, 4))})


def tuples(rng: random.Random) -> Schema:
    first = [value(rng, 0) for _ in range(rng.randint(1, 4))]
    rest: Any = rng.choice([False, {"type": "boolean"}])
    longest = len(first) + (rest is not False)
    row = {"type": "array", "prefixItems": first, "items": rest, "minItems": len(first), "maxItems": longest}
    return closed({key(rng): row})


def open_objects(rng: random.Random) -> Schema:
    """Further properties are allowed: any, or of one type."""
    known = {name: value(rng, 0) for name in keys(rng, 2)}
    further = rng.choice([True, {"type": "integer", "minimum": 0, "maximum": 9}, {"type": "boolean"}])
    return closed(known) | {"additionalProperties": further}


def unicode_names(rng: random.Random) -> Schema:
    names = [
        "größe",
        "名前",
        "ключ",
        "מפתח",
        "emoji_🙂",
        "naïve",
        "œuvre/№",
        "",
        "back\\slash",
        "tab\there",
        'a "quote"',
    ]
    values = [{"const": "déjà vu"}, {"enum": ["ja", "nein", "はい", "🙂"]}, text(rng), whole(rng)]
    return closed({name: rng.choice(values) for name in rng.sample(names, rng.randint(2, 4))})


def conjunctions(rng: random.Random) -> Schema:
    first, second = keys(rng, 2)
    least, most = {"type": "integer", "minimum": rng.randint(0, 9)}, {"type": "integer", "maximum": rng.randint(10, 99)}
    both = {"allOf": [least, most]}
    words = {"allOf": [{"type": "string"}, one_of_words(rng)]}
    return closed({first: both, second: words})


def flags(rng: random.Random) -> Schema:
    """Many long names and next to no values: nearly all of it is forced."""
    names = [f"is_{name}_{rng.choice(WORDS)}_enabled" for name in rng.sample(WORDS, rng.randint(4, 9))]
    return closed({name: flag(rng) for name in names})


def deep(rng: random.Random) -> Schema:
    schema = value(rng, 0)
    for name in keys(rng, rng.randint(4, 9)):
        schema = closed({name: schema})
    return schema


def geography(rng: random.Random) -> Schema:
    longitude = {"type": "integer", "minimum": -180, "maximum": 180}
    position = {"type": "array", "prefixItems": [longitude, {"type": "integer", "minimum": -90, "maximum": 90}]}
    position |= {"items": False, "minItems": 2, "maxItems": 2}
    point = closed({"type": {"const": "Point"}, "coordinates": {"$ref": "#/$defs/position"}})
    ring = {"type": "array", "items": {"$ref": "#/$defs/position"}, "minItems": 2, "maxItems": 3}
    line = closed({"type": {"const": "LineString"}, "coordinates": ring})
    geometry = {"anyOf": rng.sample([point, line], rng.randint(1, 2))}
    properties = {"type": {"const": "Feature"}, "geometry": geometry, "properties": record(rng)}
    return closed(properties, **{"$defs": {"position": position}})


KINDS: dict[str, Draw] = {
    draw.__name__: draw
    for draw in (
        repository, kubernetes, function_call, one_of_several_functions, event, article, nested_arrays, mixed_enums,
        large_enum, tagged_union, any_of_types, definitions, recursion, patterns, formats, ranges, constants, nullable,
        tuples, open_objects, unicode_names, conjunctions, flags, deep, geography,
    )
}  # fmt: skip
