"""Every mistake in a grid is one line with the file, the key and the nearest valid name."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

import pytest

from bench.chain import Chain
from bench.errors import BenchError, GridError, PluginError, listed, unknown
from bench.grid import Grid, load_grid, load_profile, split_spec
from bench.plan import Cell, Options, make_plan

GOOD = """
name: demo
images: {classification: 8}
attacks:
  pgd: {name: pgd, eps: 8/255, alpha: 2/255, steps: 3}
blocks:
  - roles: [classification]
    defenses: [none, jpeg]
    attacks: [pgd]
    threats: [oblivious, {level: bpda, eot: 4}]
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    return path


def test_a_good_grid_loads(tmp_path: Path) -> None:
    grid = load_grid(write(tmp_path, GOOD))
    threats = grid.blocks[0].threats
    assert [(t.level, t.eot) for t in threats] == [("oblivious", 10), ("bpda", 4)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: demo", "nam: demo", "top level: unknown key 'nam': did you mean 'name'?"),
        ("    defenses: [none, jpeg]\n", "", "blocks[0].defenses: this key is required"),
        ("defenses: [none, jpeg]", "defenses: []", "blocks[0].defenses: expected at least 1 item"),
        ("roles: [classification]", "rolls: [classification]", "unknown key 'rolls': did you mean 'roles'?"),
        ("roles: [classification]", "roles: classification", "blocks[0].roles: expected a list [value, …]"),
        (
            "threats: [oblivious,",
            "threats: [oblivius,",
            "blocks[0].threats[0]: unknown value 'oblivius': did you mean 'oblivious'?",
        ),
        ("eot: 4", "eot: 0", "blocks[0].threats[1].eot: expected a number greater than or equal to 1"),
        ("eot: 4", "eott: 4", "unknown key 'eott': did you mean 'eot'?"),
        ("{level: bpda, eot: 4}", "{level: transfer}", "level transfer needs `sources`"),
        ("{level: bpda, eot: 4}", "{level: gray_box}", "level gray_box needs a `surrogate`"),
        (
            "{level: bpda, eot: 4}",
            "{level: transfer, sources: [source], surrogate: jpeg, surrogate_seed: 1}",
            "level transfer needs a `surrogate` defense or a `surrogate_seed`",
        ),
        ("eot: 4", "surrogate: jpeg", "`surrogate` belongs to levels gray_box and transfer, not bpda"),
        ("images: {classification: 8}", "images: {classification: 0}", "images.classification"),
        ("images: {classification: 8}", "images: 8", "images: expected a mapping {key: value}, got 8"),
        (
            "images: {classification: 8}",
            "images: {classification: 8}\nname: two",
            "line 4, column 1: not valid YAML",
        ),
        (
            "roles: [classification]",
            "roles: [a]\n    profiles: []",
            "blocks[0].profiles: expected at least 1 item",
        ),
        (
            "roles: [classification]",
            "roles: [a]\n    profiles: paper",
            "blocks[0].profiles: expected a list [value",
        ),
        (
            "roles: [classification]",
            "roles: [a]\n    profiles:",
            "blocks[0].profiles: expected a list [value",
        ),
        (
            "roles: [classification]",
            "roles: [a]\n    profile: [a]",
            "key 'profile': did you mean 'profiles'?",
        ),
        ("name: demo", "name: [demo", "not valid YAML"),
        ("name: demo", "name: a/b", "name: String should match pattern"),
        ("name: demo", "name: demo\ntables: [{name: results}]", "'results' is no name for a table or figure"),
        ("name: demo", "name: demo\ntables: [{name: a}, {name: a}]", "two tables or figures are called 'a'"),
        ("name: demo", "name: demo\nfull_course: 3", "full_course"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(GridError) as error:
        load_grid(path)
    text = str(error.value)
    assert message in text and text.startswith(str(path)) and "\n" not in text


def test_a_grid_without_tables_gets_one_of_everything(tmp_path: Path) -> None:
    (table,) = load_grid(write(tmp_path, GOOD)).tables
    assert (table.metric, table.where, table.rows) == (None, {}, ["role", "metric", "defense"])
    assert load_grid(write(tmp_path, f"{GOOD}\ntables: []\n")).tables == []
    assert load_grid(write(tmp_path, f"{GOOD}\nfigures: []\n")).tables == []


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="unknown grid file"):
        load_grid(tmp_path / "absent.yaml")
    # Not the table with the nearest name: this one cannot have a grid.
    for name in ("hgd_table6.yaml", "HGD_Table6.yaml"):
        with pytest.raises(GridError, match="unknown grid file") as error:
            load_grid(Path("grids", "papers", name))
        assert "(a contest that cannot be run again); `python -m bench paper hgd/table6` prints it" in str(
            error.value
        )
        assert "did you mean" not in str(error.value)
    # Of this one, only cells cannot be measured.
    with pytest.raises(GridError, match=r"available: .*grids/papers/alignment_table3\.yaml") as error:
        load_grid(tmp_path / "alignment_table3.yaml")
    assert "no grid repeats" not in str(error.value)
    with pytest.raises(GridError, match=r"is a folder, expected a grid file, such as grids/table1\.yaml"):
        load_grid(tmp_path)
    (tmp_path / "table1").mkdir()
    with pytest.raises(GridError, match=r"expected a grid file: did you mean 'grids/table1\.yaml'\?"):
        load_grid(tmp_path / "table1")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(GridError, match="cannot be read"):
        load_grid(binary)
    with pytest.raises(GridError, match="expected a mapping"):
        load_grid(write(tmp_path, "- just\n- a list\n"))


def test_yaml_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="not valid YAML"):
        load_grid(write(tmp_path, "name: !!python/object/apply:os.system ['true']"))


def test_long_lists_are_cut() -> None:
    names = [f"name{k:02}" for k in range(20)]
    assert listed(names[:8]) == ", ".join(names[:8]) and listed([]) == "none"
    assert listed(names) == ", ".join(names[:8]) + " … and 12 more"
    said = unknown("name", "nam17", names)
    assert said.startswith("unknown name 'nam17': did you mean 'name17'? available: ")
    assert ", name17 …" in said and said.count("name") == 2 + 8 and said.endswith(" … and 12 more")


def test_profiles(tmp_path: Path) -> None:
    profile, _ = load_profile("mini")
    folder = tmp_path / "a.yaml"
    folder.mkdir()
    assert {"classification", "source", "ssd", "mask_rcnn", "pspnet", "deeplabv3"} <= set(profile.roles)
    with pytest.raises(
        GridError, match=r"--profile: .* is a folder, expected a profile file or one of .*mini"
    ):
        load_profile(str(folder), "--profile")
    with pytest.raises(GridError, match="unknown profile 'mimi': did you mean 'mini'"):
        load_profile("mimi")


def test_files_that_a_grid_names_are_looked_for_beside_it_and_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, grids = tmp_path / "here", tmp_path / "grids"
    here.mkdir(), grids.mkdir()
    monkeypatch.chdir(here)
    text = "name: own\nroles: {classification: {dataset: mini_digits, model: mini_resnet}}\n"
    grid = write(grids, GOOD.replace("images: {cl", "profile: prof.yaml\nplugins: [plug.py]\nimages: {cl"))
    with pytest.raises(PluginError) as error:
        make_plan(Options(grid))
    assert str(error.value) == f"{grid}, plugins[0]: plug-in file {grids}/plug.py does not exist"
    (grids / "plugs.py").touch()
    with pytest.raises(PluginError, match=r"does not exist: did you mean 'plugs\.py'\?"):
        make_plan(Options(grid))
    (here / "plug.py").touch()
    with pytest.raises(GridError) as missing:
        make_plan(Options(grid))
    said = str(missing.value)
    assert said.startswith(f"{grid}, profile: unknown profile file 'prof.yaml'") and "mini" in said
    assert "grid" not in said.split("prof.yaml")[1]
    with pytest.raises(GridError, match=r"^--profile: unknown profile file 'prof\.yaml'"):
        make_plan(Options(grid, "prof.yaml"))
    (grids / "profs.yaml").write_text(text)
    with pytest.raises(GridError, match=r"did you mean 'profs\.yaml'\?"):
        make_plan(Options(grid))
    for folder, name in ((here, "here"), (grids, "beside")):  # the second one wins
        (folder / "prof.yaml").write_text(text.replace("own", name))
        assert make_plan(Options(grid)).profile == name
        assert make_plan(Options(grid, "prof.yaml")).profile == "here"


def test_plugin_specs() -> None:
    assert split_spec("jpeg", "g") == ("jpeg", {}, None)
    assert split_spec("robustbench:Carmon2019Unlabeled", "g") == (
        "robustbench",
        {"id": "Carmon2019Unlabeled"},
        None,
    )
    assert split_spec({"name": "jpeg", "quality": 50, "label": "q50"}, "g") == (
        "jpeg",
        {"quality": 50},
        "q50",
    )
    with pytest.raises(BenchError, match="expected a `name`"):
        split_spec({"quality": 50}, "g")


def test_the_schema_describes_every_key() -> None:
    schema = Grid.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Grid.model_fields)
    assert {"Block", "ThreatSpec", "Evaluate", "TableSpec"} <= set(schema["$defs"])


def _planned(tmp_path: Path, overrides: str) -> list[Cell]:
    profile = tmp_path / "own.yaml"
    profile.write_text(
        "name: own\nroles:\n  a: {dataset: {name: mini_digits, count: 2}, model: mini_resnet}\n"
        f"  b: {{dataset: {{name: mini_digits, count: 2}}, model: mini_resnet}}\n{overrides}"
    )
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        f"name: demo\nprofile: {profile}\n"
        "attacks: {fast: {name: fgsm, eps: 8/255}}\n"
        "blocks: [{roles: [a, b], defenses: [jpeg, [jpeg, bit_depth]], attacks: [fast], threats: [oblivious]}]\n"
    )
    return list(make_plan(Options(grid)).cells)


def test_a_profile_replaces_parameters_of_a_grid(tmp_path: Path) -> None:
    own = "{defenses: {jpeg: {quality: 11}}, attacks: {fgsm: {eps: 1/255}}}"
    plain = _planned(tmp_path, "")
    by_role = _planned(tmp_path, f"overrides: {{b: {own}}}")
    # The role's own entry replaces its task's.
    by_task = _planned(tmp_path, f"overrides: {{classification: {own}, a: {{}}}}")
    assert [c.key for c in by_task] == [c.key for c in by_role]
    for before, after in zip(plain, by_role, strict=True):
        assert before.label == after.label
        assert (before.key == after.key) == (after.target.role == "a")
        if after.target.role == "b":
            members = after.defense.members if isinstance(after.defense, Chain) else (after.defense,)
            assert members[0].params["quality"] == 11
            assert after.attack is None or Fraction(after.attack.params["eps"]) == Fraction(1, 255)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "{classificaton: {}}",
            "overrides: unknown role or task 'classificaton': did you mean 'classification'?",
        ),
        ("{b: {defense: {}}}", "unknown key 'defense': did you mean 'defenses'?"),
        ("{b: {defenses: {jpg: {}}}}", "overrides.b.defenses: unknown defense 'jpg': did you mean 'jpeg'?"),
        ("{b: {attacks: {fgms: {}}}}", "overrides.b.attacks: unknown attack 'fgms': did you mean 'fgsm'?"),
        ("{b: {defenses: {jpeg: {quality: 0}}}}", "overrides, role b: "),
        ("{b: {defenses: {jpeg: {qualty: 9}}}}", "did you mean 'quality'?"),
    ],
)
def test_mistakes_in_overrides_are_one_line(tmp_path: Path, overrides: str, message: str) -> None:
    with pytest.raises(BenchError) as error:
        _planned(tmp_path, f"overrides: {overrides}")
    assert message in str(error.value) and "\n" not in str(error.value) and "own.yaml" in str(error.value)


LIMITED = """
name: demo
images: {classification: 8, elsewhere: 3}
defenses:
  big: {name: sr, weights: not_there.pt}
  chained: [jpeg, inner]
  inner: {name: sr, weights: not_there.pt}
  soft: {name: jpeg, quality: 50}
attacks:
  pgd: {name: pgd, eps: 8/255, alpha: 2/255, steps: 3}
  learned: {name: cda, weights: not_there.pth}
blocks:
  - roles: [classification]
    defenses: [none, soft]
    attacks: [pgd]
    threats: [oblivious]
  - roles: [elsewhere]
    defenses: [big, chained, soft]
    attacks: [learned, pgd]
    threats: [{level: transfer, sources: [nowhere], surrogate: inner}]
    profiles: [paper]
"""


def test_a_block_of_other_profiles_is_left_out_with_what_only_it_has(tmp_path: Path) -> None:
    whole = make_plan(Options(write(tmp_path, LIMITED)))
    first = LIMITED[: LIMITED.index("  - roles: [elsewhere]")].replace(", elsewhere: 3", "").splitlines()
    needed = [line for line in first if "not_there" not in line and "chained" not in line]
    alone = make_plan(Options(write(tmp_path, "\n".join(needed))))
    assert [c.key for c in whole.cells] == [c.key for c in alone.cells] and len(whole.cells) == 4
    assert whole.orders == alone.orders and list(whole.targets) == ["classification"]
    # A table may name its labels, what it shares not counted.
    assert {column: set(labels) for column, labels in whole.left_out.items()} == {
        "role": {"elsewhere"}, "defense": {"big", "chained"}, "attack": {"learned"}, "level": {"transfer"},
        "level_label": {"transfer from nowhere via inner"},
    }  # fmt: skip
    assert not any(alone.left_out.values())
    # For its own profile it is there, and so are its demands.
    mine = LIMITED.replace("profiles: [paper]", "profiles: [paper, mini]")
    with pytest.raises(BenchError, match=r"defenses\.big.*not_there\.pt"):
        make_plan(Options(write(tmp_path, mine)))
    # A profile of one's own counts by the name it has.
    profile = tmp_path / "own.yaml"
    profile.write_text("name: own\nroles: {classification: {dataset: mini_digits, model: mini_vgg}}\n")
    own = GOOD.replace("threats:", "profiles: [own]\n    threats:")
    assert len(make_plan(Options(write(tmp_path, own), profile=str(profile))).cells) == 6


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[paper]", "[papre]", "blocks[1].profiles[0]: unknown profile 'papre': did you mean 'paper'?"),
        ("threats: [oblivious]", "threats: [oblivious]\n    profiles: [fashion]",
         "blocks: none is for profile mini, all are for fashion, paper"),
        # What cannot be made here is still checked by name.
        ("{name: sr, weights: not_there.pt}\n  soft", "{name: srr, weights: a.pt}\n  soft",
         "defenses.inner: unknown defense 'srr': did you mean 'sr'?"),
        ("big: {name: sr, weights", "big: {name: sr, weigths", "did you mean 'weights'?"),
        ("chained: [jpeg, inner]", "chained: [jpg, inner]", "defenses.chained[0]: unknown defense 'jpg'"),
        ("{name: cda,", "{name: cdaa,", "attacks.learned: unknown attack 'cdaa': did you mean 'cda'?"),
        ("[learned, pgd]", "[lerned, pgd]", "blocks[1].attacks[0]: unknown attack 'lerned': did you mean 'learned'?"),
        ("[big, chained,", "[big, chaind,", "defenses[1]: unknown defense 'chaind': did you mean 'chained'?"),
        ("elsewhere: 3", "elswhere: 3", "images: unknown role or task 'elswhere'"),
    ],
)  # fmt: skip
def test_mistakes_in_blocks_of_other_profiles_are_one_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in LIMITED
    path = write(tmp_path, LIMITED.replace(old, new))
    with pytest.raises(BenchError) as error:
        make_plan(Options(path))
    assert message in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


def test_overrides_leave_what_a_block_says_for_its_profile(tmp_path: Path) -> None:
    profile = tmp_path / "own.yaml"
    profile.write_text(
        "name: own\nroles: {a: {dataset: {name: mini_digits, count: 2}, model: mini_resnet}}\n"
        "overrides: {a: {defenses: {jpeg: {quality: 11}, tvm: {weight: 0.5}}, attacks: {fgsm: {eps: 1/255}}}}\n"
    )
    blocks = "\n".join(
        f"  - {{roles: [a], defenses: [{d}], attacks: [{a}], threats: [oblivious, bpda]{limit}}}"
        for d, a, limit in (
            ("q50, both, {name: tvm, label: usual}", "fast", ""),
            ("q50mine, {name: jpeg, label: usual_too}", "slow", ", profiles: [own]"),
        )
    )
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        f"name: demo\nprofile: {profile}\n"
        "attacks: {fast: {name: fgsm, eps: 8/255}, slow: {name: fgsm, eps: 8/255}}\n"
        "defenses: {q50: {name: jpeg, quality: 50}, q50mine: [q50, {name: tvm, weight: 0.25}], both: [q50, tvm]}\n"
        f"blocks:\n{blocks}\n"
    )
    cells = {(c.defense_label, c.attack_label): c for c in make_plan(Options(grid)).cells}

    def members(label: str) -> list[object]:
        defense = cells[label, "clean"].defense
        parts = defense.members if isinstance(defense, Chain) else (defense,)
        return [p.params.get("quality", p.params.get("weight")) for p in parts]

    assert members("q50") == [11] and members("both") == [11, 0.5] and members("usual") == [0.5]
    # Said by the block, and left to the profile.
    assert members("q50mine") == [50, 0.25] and members("usual_too") == [11]
    for (_, name), cell in cells.items():
        if cell.attack is not None:
            assert Fraction(cell.attack.params["eps"]) == Fraction(8 if name == "slow" else 1, 255)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ('{name: pgd, target: "class:12"}', "target 'class:12': class 12 does not exist, the model has 10 classes"),
        ("{name: pgd, target: nxt}", "unknown target rule of task classification 'nxt': did you mean 'next'?"),
        ("{name: deepfool, candidates: 20}", "candidates: 20 is more than the 10 classes of the model"),
        ("{name: apgd, loss: dlr_targeted, classes: 20}", "classes: 20 is more than the 9 wrong classes of the model"),
        ("{library: foolbox, attack: L2DeepFoolAttak}", "did you mean 'L2DeepFoolAttack'?"),
        ("{library: foolbox, attack: LinfPGD, eps: 8/255, params: {steps: 0}}", "expected at least 1, got 0"),
        (
            "{library: foolbox, attack: L2DeepFoolAttack, params: {candidates: 50}}",
            "params.candidates: 50 is more than the 10 classes of the model",
        ),
        ("{library: foolbox, attack: DatasetAttack}", "foolbox's DatasetAttack has to be fed"),
        ("{library: foolbox, attack: DDNAttack, params: {steps: abc}}", "expected an integer, got 'abc'"),
        ("{name: apgd, loss: dlr, classes: 50}", "classes: 50 belongs to loss dlr_targeted"),
        ("{name: pgd, target: 3}", "target: expected a string, got 3: did you mean 'class:3'?"),
    ],
)  # fmt: skip
def test_attacks_that_do_not_fit_the_classes_are_found_before_anything_runs(
    tmp_path: Path, attack: str, message: str
) -> None:
    if "foolbox" in attack:
        pytest.importorskip("foolbox")
    grid = write(tmp_path, GOOD.replace("attacks: [pgd]", f"attacks: [{attack}]"))
    with pytest.raises(BenchError, match=re.escape(message)) as raised:
        make_plan(Options(grid))
    assert str(grid) in str(raised.value) and "blocks[0].attacks[0]" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_library_names_its_attack_without_a_name(tmp_path: Path) -> None:
    pytest.importorskip("foolbox")
    short = "{library: foolbox, attack: L2DeepFoolAttack}"
    cells = [
        make_plan(Options(write(tmp_path, GOOD.replace("attacks: [pgd]", f"attacks: [{spec}]")))).cells
        for spec in (short, short.replace("{", "{name: library, "))
    ]
    assert [c.key for c in cells[0]] == [c.key for c in cells[1]]
