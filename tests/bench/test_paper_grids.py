"""The grids of the papers' tables: they plan, they cover what is printed, and their parameters are the papers'; the
profile with the papers' data and models runs.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
import yaml
from PIL import Image

from attacks.cross_domain import Generator
from bench.errors import BenchError, MissingCheckpoint, WeightsError
from bench.figures.output import check_figures
from bench.frame import cell_frame
from bench.grid import GRIDS, Grid, Overrides, load_grid, load_profile, read_yaml, split_spec
from bench.paper import Value, compare, frame_metric, layout, not_covered, only_on, table_ids, values
from bench.plan import Options, Plan, make_plan
from bench.protocols import Dataset, Sample
from bench.registry import ATTACKS, DATASETS, DEFENSES, MODELS
from bench.tables import build, selected
from bench.weights import save_safetensors
from defenses._learned import Learned
from defenses.networks.edsr import EDSR
from defenses.training import session
from defenses.training.objectives import objective
from tasks.mini.layout import write_tree

PAPERS = sorted((GRIDS / "papers").glob("*.yaml"))
NOT_COVERED = read_yaml(GRIDS.parent / "results" / "paper" / "not_covered.yaml")
# Adversarially trained targets whose weights may not have been built -> what has the same task.
SIBLINGS = {
    "mini_resnet_at": "mini_resnet", "mini_resnet_trades": "mini_resnet", "mini_resnet_free": "mini_resnet",
    "mini_pspnet_sat": "mini_pspnet", "mini_ssd_mtd": "mini_ssd",
}  # fmt: skip


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of checkpoints that are not there; a grid plans in spite of them."""
    names: list[str] = []
    placed, identity = Learned.placed, Learned.identity

    def tolerant(self: Learned, site: Any) -> Any:
        try:
            return placed(self, site)
        except MissingCheckpoint as error:
            stand_in = copy.copy(self)
            stand_in.source = error.trainings[0].name
            names.append(stand_in.source)
            return stand_in

    def named(self: Learned) -> dict[str, Any]:
        return identity(self) if self.ready else {"name": self.name, "missing": self.source}

    monkeypatch.setattr(Learned, "placed", tolerant)
    monkeypatch.setattr(Learned, "identity", named)
    yield names


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini profile, targets that are not there replaced."""
    text = (GRIDS / "profiles" / "mini.yaml").read_text(encoding="utf-8")
    for name, sibling in SIBLINGS.items():
        try:
            MODELS.create(name, {}).identity()
        except BenchError:
            text = text.replace(f"model: {name}}}", f"model: {sibling}}}")
    path = tmp_path_factory.mktemp("profile") / "mini.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def _key(value: Value) -> tuple[Any, ...]:
    spec = layout(f"{value.paper}/{value.table}")
    part = next((p.title for p in spec.panels if _has(value, p.where)), "")
    rows, columns = (" / ".join(filter(None, spec.label(value, axis))) for axis in (spec.rows, spec.columns))
    return part, rows, columns, frame_metric(value)


def _has(value: Value, where: Mapping[str, Any]) -> bool:
    return all(getattr(value, k) in (v if isinstance(v, list | tuple) else [v]) for k, v in where.items())


def _covered(plan: Plan) -> tuple[set[tuple[Any, ...]], set[str]]:
    """The printed cells that a plan measures, and the tables it is compared with."""
    frame = cell_frame(plan, None)
    covered: set[tuple[Any, ...]] = set()
    compared = set()
    for spec in plan.grid.tables:
        build(frame, spec)
        if spec.paper is not None:
            lines = compare(selected(frame, spec), spec.paper, plan.left_out)
            lines = lines[lines["status"] != "skip"]
            covered.update(zip(lines["part"], lines["row"], lines["column"], lines["metric"], strict=True))
            compared.add(str(spec.paper["table"]))
    return covered, compared


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_grid_covers_its_table_but_for_what_is_named(path: Path, profile: Path, missing: list[str]) -> None:
    plan = make_plan(Options(path, profile=str(profile)))
    assert plan.grid.name == path.stem
    check_figures(plan)
    # HGD's denoising losses are numbers of images, not of rows: a figure has them.
    assert bool(plan.grid.figures) == ("_fig" in path.stem or path.stem == "hgd_table2")
    covered, compared = _covered(plan)
    paper, _, number = path.stem.partition("_")
    if not number.startswith("table"):
        assert not compared
        return
    assert compared == {f"{paper}/{number}"}
    for value in values(paper):
        if value.table == number and value.text:
            entries = [e for e in NOT_COVERED.get(f"{paper}/{number}", []) if _has(value, e["where"])]
            assert len(entries) <= 1
            nowhere = [e["reason"] for e in entries if "profile" not in e]
            assert not_covered(value) == next(iter(nowhere), None)
            assert only_on(value) == ("paper" if entries and not nowhere else None)
            # On the embedded data, which is not the profile that an entry may name.
            assert (_key(value) in covered) != bool(entries), (value, entries)
    if missing:
        print(f"{path.stem}: not trained yet: {', '.join(sorted(set(missing)))}")


def test_every_table_has_a_grid_or_a_reason() -> None:
    grids = {path.stem.replace("_", "/", 1) for path in PAPERS}
    for id in table_ids():
        assert id in grids or id == "hgd/table6"
    assert set(NOT_COVERED) <= set(table_ids())


def test_what_is_left_of_the_printed_numbers() -> None:
    """What grids/papers/README.md says of them."""
    numbers = [
        value for paper in ("cafd", "alignment", "nrp", "hgd") for value in values(paper) if value.text
    ]
    nowhere = [value for value in numbers if not_covered(value) is not None]
    there = [value for value in numbers if only_on(value) == "paper"]
    assert (len(numbers), len(nowhere), len(there)) == (2827, 103, 538)
    assert {value.defense for value in nowhere if value.paper != "hgd"} == {"fpd"}
    text = " ".join((GRIDS / "papers" / "README.md").read_text(encoding="utf-8").split())
    assert "Of the 2,827 printed numbers 103 are in no grid and 538 on profile `paper` alone" in text


def test_every_figure_of_results_has_a_grid() -> None:
    figures = {
        "cafd": [1, 3, 4, 5, 6],
        "nrp": [3, 4, 5, 6, 7, 8],
        "hgd": [5, 6, 7],
        "alignment": [1, 4, 6, 7, 8, 9],
    }
    wanted = {f"{paper}_fig{number}" for paper, numbers in figures.items() for number in numbers}
    assert {path.stem for path in PAPERS if "_fig" in path.stem} == wanted


def test_both_profiles_bind_every_role() -> None:
    mini, paper = load_profile("mini")[0], load_profile("paper")[0]
    used: dict[str, set[str]] = {"mini": set(), "paper": set()}
    for path in PAPERS:
        for block in load_grid(path).blocks:
            assert block.is_for("paper") and block.profiles in ([], ["paper"])
            for name in ("mini", "paper"):
                if block.is_for(name):
                    used[name] |= {*block.roles, *(s for threat in block.threats for s in threat.sources)}
    assert used["mini"] <= set(mini.roles) and used["paper"] == set(paper.roles)
    # What only blocks of profile paper have are targets that nobody trained on the embedded data.
    assert {role.rpartition("_")[2] for role in used["paper"] - used["mini"]} == {
        "finetune", "doa", "sat", "ddcat", "cls", "loc", "con", "mtd",
    }  # fmt: skip
    for role, binding in paper.roles.items():
        tasks = set()
        for registry, spec in ((DATASETS, binding.dataset), (MODELS, binding.model)):
            name, params, _ = split_spec(spec, role)
            tasks.add(registry.create(name, params, role).task)
        assert len(tasks) == 1


def test_roles_with_equal_data_and_model_share_checkpoints() -> None:
    from defenses.training.session import plan_training

    assert plan_training("mini", "cifar10_vgg19", "cafd").name == "cafd-mini-source"
    for role in ("cifar100_wrn34", "imagenet_inc_v3"):
        there, here = plan_training("mini", role, "hgd"), plan_training("mini", "classification", "hgd")
        assert (there.name, there.key) == (here.name, here.key)
    assert plan_training("mini", "cifar10_resnet50", "hgd").role == "wideresnet"
    assert plan_training("mini", "voc0712_ssd", "hgd").role == "ssd"


SPOTS = [
    # Typed from the papers and their code.
    ("cafd_table1", "attacks", "pgd_n", {"name": "pgd", "eps": "8/255", "alpha": "0.01", "steps": 40}),
    ("cafd_table1", "attacks", "ddn_n", {"steps": 100, "gamma": "0.05", "initial_norm": "1", "levels": 256}),
    ("cafd_table1", "attacks", "ti_dim_n", {"kernel": 15, "sigmas": 3, "prob": "0.5", "decay": 1, "steps": 40}),
    ("cafd_table1", "defenses", "tvm_w0.003", {"weight": "0.003"}),
    ("cafd_table3", "attacks", "pgd_n_it10", {"steps": 10, "eps": "8/255"}),
    ("cafd_fig6", "attacks", "pgd_n-16", {"eps": "16/255"}),
    ("alignment_table1", "attacks", "pgd", {"eps": "0.031", "alpha": "0.0075", "steps": 8}),
    ("alignment_table2", "attacks", "bim", {"eps": "0.03", "alpha": "0.01", "steps": 4}),
    ("alignment_table7", "attacks", "cls_loc", {"loss": "cls+loc", "eps": "8/255"}),
    ("nrp_table1", "attacks", "dim_ti", {"eps": "16/255", "alpha": "8/1275", "steps": 10, "prob": "0.7"}),
    ("nrp_table2", "defenses", "tvm_w10", {"weight": 10, "weight_is": "bregman"}),
    ("nrp_table4", "attacks", "ssp-16", {"eps": "16/255", "alpha": "0.01", "steps": 100}),
    ("hgd_table3", "attacks", "ifgsm4-16", {"eps": "16/255", "alpha": "4/255", "steps": 4, "labels": "predicted"}),
    ("hgd_table3", "defenses", "fgd", {"recipe": "hgd_features"}),
]  # fmt: skip


@pytest.mark.parametrize(("grid", "kind", "label", "expected"), SPOTS)
def test_parameters_are_the_papers(grid: str, kind: str, label: str, expected: dict[str, Any]) -> None:
    spec = getattr(load_grid(GRIDS / "papers" / f"{grid}.yaml"), kind)[label]
    for name, value in expected.items():
        assert _number(spec[name]) == _number(value), name


def _number(value: Any) -> Any:
    try:
        return Fraction(str(value))
    except ValueError:
        return value


def test_the_papers_profile_runs_on_a_data_root(
    bench: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files as the data and the weights are published, at a small scale: two of NIPS 2017's images, SqueezeNet."""
    folder = tmp_path / "data" / "nips2017"
    (folder / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 299, 299, 3), dtype=np.uint8)
    for i in range(2):
        Image.fromarray(pixels[i]).save(folder / "images" / f"{i}.png")
    (folder / "images.csv").write_text("ImageId,URL,TrueLabel,TargetClass\n0,,306,779\n1,,1,79\n")
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), tmp_path / "squeezenet1_1-b8a52dc0.pth")
    torch.save(EDSR(4, 1).state_dict(), tmp_path / "edsr.pt")
    torch.save(Generator().state_dict(), tmp_path / "comics.pth")
    grid = {
        "name": "small",
        "profile": "paper",
        "defenses": {"sr": {"name": "sr", "weights": "edsr.pt"}},
        "attacks": {
            "bim": {"name": "bim", "eps": "8/255", "alpha": "2/255", "steps": 2},
            "cda": {"name": "cda", "weights": "comics.pth", "eps": "8/255"},
        },
        "blocks": [
            {
                "roles": ["nips_squeezenet"],
                "defenses": ["sr"],
                "attacks": ["bim", "cda"],
                "threats": ["oblivious"],
                "profiles": ["paper"],
            },
            {
                "roles": ["nips_squeezenet"],
                "defenses": ["none", "jpeg"],
                "attacks": ["bim"],
                "threats": ["oblivious", "bpda"],
            },
        ],
        "tables": [
            {"name": "main", "rows": ["level", "attack"], "columns": ["defense"], "metric": "accuracy"}
        ],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(grid))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCH_DATA", "data")
    command = ("run", "--grid", "small.yaml", "--workers", "1", "--device", "cpu", "--out", "out")
    code, _, err = bench(*command, "--store", "store")
    assert code == 0, err
    frame = pd.read_csv("out/results.csv")
    accuracy = frame[(frame["metric"] == "accuracy") & (frame["attack"] != "worst case")]
    # On the bare model the level that knows of the defense is the one that does not.
    assert len(accuracy) == 6 + 3 and set(accuracy["status"]) == {"ok"} and set(accuracy["n"]) == {2}
    # Weights that are not there: where to put which file.
    (tmp_path / "squeezenet1_1-b8a52dc0.pth").unlink()
    code, _, err = bench(*command, "--store", "other")
    assert code == 2 and "squeezenet1_1-b8a52dc0.pth" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("role", "said"),
    [
        (
            "cityscapes_deeplabv3_ddcat",
            "it is a DeepLabv3 of this config after DDC-AT; the one that Xu et al. publish is",
        ),
        (
            "voc2012_pspnet_finetune",
            "it is a PSPNet of this config after further training of the published one",
        ),
        (
            "voc0712_rfbnet_con",
            "it is an SSD of this config after adversarial training on both losses together",
        ),
        ("nips_inc_v3_ens3", "it is Inc-v3_ens3 of Tramer et al."),
        ("cityscapes_pspnet_sat", "it is a PSPNet of this config after adversarial training"),
        ("voc0712_ssd_mtd", "it is an SSD of this config after adversarial training"),
    ],
)
def test_missing_weights_of_a_retrained_model_say_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, said: str
) -> None:
    """Not the plain model's, which would be found under the same id or config."""
    monkeypatch.chdir(tmp_path)
    name, params, _ = split_spec(load_profile("paper")[0].roles[role].model, role)
    with pytest.raises(WeightsError, match=said):
        MODELS.create(name, params).identity()


def test_missing_targets_say_what_makes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finetuned one would otherwise be trained like the one it starts from."""
    monkeypatch.chdir(tmp_path)
    options = {
        "trades": "--adversarial trades",
        "free": "--adversarial free --epochs 25",
        "doa": "--adversarial doa",
    }
    checked = set()
    for role, binding in load_profile("paper")[0].roles.items():
        base, _, last = role.rpartition("_")
        name, params, _ = split_spec(binding.model, role)
        if name != "cifar" or last not in (*options, "finetune"):
            continue
        wanted = options.get(last, options.get(base.rpartition("_")[2], ""))
        if last == "finetune":
            wanted = f"--init {'_'.join(role.split('_')[:2])}.safetensors {wanted}".rstrip()
        with pytest.raises(WeightsError) as error:
            MODELS.create(name, params).identity()
        assert f"{wanted} --out {params['checkpoint']}`" in str(error.value), role
        checked.add(role)
    assert len(checked) == 18 + 2 + 11


# -- what the papers' profile trains -----------------------------------------------------------------------------------
def _members(grid: Grid, spec: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and parameters of the defenses a spec is made of."""
    if isinstance(spec, list):
        for part in spec:
            yield from _members(grid, part)
    elif isinstance(spec, str) and grid.defenses.get(spec, spec) != spec:
        yield from _members(grid, grid.defenses[spec])
    else:
        yield split_spec(spec, "")[:2]


def _trainings() -> set[tuple[str, str]]:
    """(role, recipe) of every checkpoint the papers' grids ask for."""
    found = set()
    for path in PAPERS:
        grid = load_grid(path)
        for block in grid.blocks:
            specs = [*block.defenses, *(t.surrogate for t in block.threats if t.surrogate is not None)]
            for name, params in (member for spec in specs for member in _members(grid, spec)):
                if isinstance(DEFENSES.resolve(name), type) and issubclass(DEFENSES.resolve(name), Learned):
                    recipe = params.get("recipe") or name
                    found |= {(params.get("trained_for") or role, recipe) for role in block.roles}
    return found


class _Large(Dataset):
    """A classification set with as many images as ImageNet's recipes ask for; none is read."""

    task = "classification"
    name = "large"

    def __init__(self, labelled: bool) -> None:
        self.labelled = labelled  # type: ignore[misc]

    def __len__(self) -> int:
        return 30_000

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError(f"image {index} is read")

    def fingerprint(self) -> str:
        return "large"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data root with a few scenes, and a file for all weights; sets of images are as large as asked for."""
    place = tmp_path_factory.mktemp("paper")
    data = place / "data"
    write_tree(place, "cityscapes", "train", 2).rename(data)
    (data / "VOCdevkit").mkdir()
    for year in ("2007", "2012"):
        tree = write_tree(place / year, "voc", "train", 2).rename(data / "VOCdevkit" / f"VOC{year}")
        (tree / "ImageSets" / "Main" / "train.txt").rename(tree / "ImageSets" / "Main" / "trainval.txt")
        for path in (tree / "Annotations").iterdir():
            path.write_text(re.sub(r"(<object><name>)\w+", r"\1bird", path.read_text()))
    for binding in load_profile("paper")[0].roles.values():
        if isinstance(binding.model, dict):
            file = place / str(binding.model.get("checkpoint", binding.model.get("weights")))
            if file.suffix == ".safetensors":
                save_safetensors(file, {"x": torch.zeros(1)}, meta={"mean": [0, 0, 0], "std": [1, 1, 1]})
            else:
                torch.save({"x": torch.zeros(1)}, file)
        elif binding.model.startswith("robustbench:"):
            file = place / "models" / "cifar10" / "Linf" / f"{binding.model.partition(':')[2]}.pt"
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"x": torch.zeros(1)}, file)
    # What the grids and the overrides name themselves.
    torch.save(EDSR(4, 1).state_dict(), place / "edsr_baseline_x2-1bc95232.pt")
    for pictures in ("imagenet", "comics", "paintings"):
        for k, model in enumerate(("inc_v3", "res152")):
            torch.save(
                {"x": torch.full((1,), float(len(pictures) + k))}, place / f"cda_{pictures}_{model}.pth"
            )
    made = session._dataset

    def dataset(*arguments: Any) -> Dataset:
        found = made(*arguments)
        return found if found.task != "classification" else _Large(found.labelled)

    session._plan_training.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("BENCH_DATA", "data")
        patch.setattr(session, "_dataset", dataset)
        yield place
    session._plan_training.cache_clear()


@pytest.mark.parametrize("role", sorted({role for role, _ in _trainings()}))
def test_every_training_of_the_papers_profile_can_be_planned(root: Path, role: str) -> None:
    for recipe in sorted(recipe for other, recipe in _trainings() if other == role):
        training = session.plan_training("paper", role, recipe)
        if role.startswith(("voc", "cityscapes")):
            assert len(training.data) == (4 if "0712" in role else 2)
        # Attacks, losses and data, with what they need; networks without their memory.
        assert len(training.key) == 64
        with torch.device("meta"):
            side = training.settings.crop or 300
            network, critic = training.recipe.build((side, side), 20)
        losses = objective(training.recipe.objective, dict(training.recipe.objective_args))
        assert losses.adversarial == (critic is not None)
        assert next(network.parameters()).is_meta


@pytest.fixture
def named_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of images are there for a plan, which reads none."""
    create = DATASETS.create

    def stand_in(name: str, params: Mapping[str, Any] | None = None, where: str = "") -> Dataset:
        made: Dataset = create(name, params, where)
        monkeypatch.setattr(made, "ids", lambda: [str(i) for i in range(1000)])
        monkeypatch.setattr(made, "fingerprint", lambda: f"{name} {params}")
        if name == "coco":  # whose classes are in a file
            monkeypatch.setitem(vars(made), "classes", ())
        return made

    monkeypatch.setattr(DATASETS, "create", stand_in)


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_every_grid_can_be_planned_on_the_papers_profile(
    root: Path, path: Path, named_images: None, missing: list[str]
) -> None:
    """There a grid covers all that is not covered nowhere, and every cell of blocks of its own is one to run."""
    plan = make_plan(Options(path, profile="paper"))
    covered, _ = _covered(plan)
    paper, _, number = path.stem.partition("_")
    for value in values(paper):
        if value.table == number and value.text:
            assert (_key(value) in covered) == (not_covered(value) is None), value
    for index, block in enumerate(plan.grid.blocks):
        if block.profiles:
            mine = [
                c for c in plan.cells if c.target.role in block.roles and c.defense_label in block.defenses
            ]
            assert mine and not [c.label for c in mine if c.skip], index


def test_a_copy_of_the_papers_profile_needs_no_unpublished_targets(
    root: Path, tmp_path: Path, named_images: None, missing: list[str]
) -> None:
    """As grids/papers/README.md says."""
    own = tmp_path / "mine.yaml"
    text = (GRIDS / "profiles" / "paper.yaml").read_text(encoding="utf-8")
    own.write_text(text.replace("name: paper\n", "name: mine\n", 1), encoding="utf-8")
    path = GRIDS / "papers" / "alignment_table9.yaml"
    plan = make_plan(Options(path, profile=str(own)))
    assert set(plan.targets) == {"cityscapes_deeplabv3", "voc2012_deeplabv3", "voc0712_rfbnet"}
    assert _covered(plan)[0] == _covered(make_plan(Options(path)))[0]


def test_generators_of_other_pictures_are_each_roles_own(
    root: Path, named_images: None, missing: list[str]
) -> None:
    """Against Inc-v3 in front of a classifier, against Res-152 in front of a detector, and not ImageNet's."""
    plan = make_plan(Options(GRIDS / "papers" / "nrp_table2.yaml", profile="paper"))
    files: dict[tuple[str, str], set[str]] = {}
    for cell in plan.cells:
        if cell.attack is not None and cell.attack.name == "cda":
            pictures = cell.attack_label.split("_")[1].split("-")[0]
            files.setdefault((cell.target.role, pictures), set()).add(str(cell.attack.params["weights"]))
            assert cell.attack_label.endswith(f"-{Fraction(cell.attack.params['eps']) * 255}")
    models = {"nips_incres_v2_ens": "inc_v3", "coco_mask_rcnn": "res152"}
    assert files == {
        (role, pictures): {f"cda_{pictures}_{model}.pth"}
        for role, model in models.items()
        for pictures in ("imagenet", "comics", "paintings")
    }


ALIGNMENT = ("alignment", "alignment_li", "alignment_lf", "alignment_lif", "alignment_lt", "alignment_ltf")


@pytest.mark.parametrize("recipe", ALIGNMENT)
@pytest.mark.parametrize(
    "role", ["cityscapes_pspnet", "cityscapes_deeplabv3", "voc2012_pspnet", "voc2012_deeplabv3"]
)
def test_alignment_is_trained_on_label_maps_as_the_paper_says(root: Path, role: str, recipe: str) -> None:
    """Appendix A.1: BIM of eps 0.03, 3 steps of 0.01; four down-samplings, 512x512 for the generator."""
    training = session.plan_training("paper", role, recipe)
    ((attack, _),) = training.attacks
    assert attack.name == "bim" and attack.params["steps"] == 3
    assert (Fraction(attack.params["eps"]), Fraction(attack.params["alpha"])) == (
        Fraction(3, 100),
        Fraction(1, 100),
    )
    assert training.settings.crop == 512
    assert training.recipe.network_args == {"downsamplings": 4}
    assert not training.recipe.static


@pytest.mark.parametrize("recipe", ALIGNMENT)
@pytest.mark.parametrize("role", ["voc0712_ssd", "voc0712_rfbnet"])
def test_alignment_is_trained_on_boxes_as_the_paper_says(root: Path, role: str, recipe: str) -> None:
    """Appendix A.1: 8 of 255 on the classification or the localisation loss; 256x256 for the generator."""
    training = session.plan_training("paper", role, recipe)
    assert [attack.params["loss"] for attack, _ in training.attacks] == ["cls", "loc"]
    assert {(a.name, Fraction(a.params["eps"]), weight) for a, weight in training.attacks} == {
        ("fgsm", Fraction(8, 255), 1.0)
    }
    assert training.recipe.network_args == {"downsamplings": 4, "size": 256}
    assert training.recipe.objective_args["conditioned"] is False


@pytest.mark.parametrize("role", ["cifar100_wrn34", "imagenet64_resnet50", "voc2012_pspnet", "voc0712_ssd"])
def test_what_alignment_compares_with_has_its_epochs_and_batch(root: Path, role: str) -> None:
    wanted = session.plan_training("paper", role, "alignment").recipe
    for name in ("hgd", "apegan_prime", "nrp"):
        found = session.plan_training("paper", role, name).recipe
        assert (found.epochs, found.batch) == (wanted.epochs, wanted.batch)


# -- what the papers' profile has in place of the embedded data's ------------------------------------------------------
def test_no_grid_keeps_the_embedded_datas_settings_on_the_papers_profile() -> None:
    profile = load_profile("paper")[0]
    replaced = set()
    for path in PAPERS:
        grid = load_grid(path)
        for block in grid.blocks:
            attacks = [split_spec(grid.attacks.get(str(a), a), "")[:2] for a in block.attacks]
            defenses = [member for spec in block.defenses for member in _members(grid, spec)]
            wanted = [("attacks", "cda", "weights"), ("defenses", "quilting", "dataset")]
            if path.stem == "nrp_table4":
                wanted.append(("attacks", "ssp", "vgg"))
            for role in block.roles:
                own = profile.overrides.get(role, Overrides())
                for kind, name, key in wanted:
                    used = [params for n, params in (*attacks, *defenses) if n == name]
                    changes = getattr(own, kind).get(name, {})
                    for params in used:
                        # A block of this profile says itself what it takes.
                        said = bool(block.profiles) and key in params
                        assert said or changes.get(key), f"{path.stem}, {role}: {name} is the embedded data's"
                        (ATTACKS if kind == "attacks" else DEFENSES).validate(name, {**params, **changes})
                        replaced.add(name)
    assert replaced == {"cda", "quilting", "ssp"}
