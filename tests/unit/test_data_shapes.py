from collections import Counter
from dataclasses import replace

import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from vistok.data import shapes
from vistok.data.shapes import COLORS, HELD_OUT, RADII, RELATIONS, SHAPES, SceneObject, detect, render
from vistok.errors import UserError
from vistok.geneval_rules import faults, relations


def make(split="train", size=32, **config):
    return shapes.build(shapes.Config(**config), split, size)


def kinds(objects):
    return Counter((thing.shape, thing.color, thing.size) for thing in objects)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_detector_reads_clean_images_exactly(size, split):
    world = make(split, size)
    right = 0
    for index in range(500):
        scene = world.scene(index)
        found = detect(world.get(index)["image"])
        right += kinds(found) == kinds(scene.objects)
        for thing in found:
            distances = [max(abs(thing.x - other.x), abs(thing.y - other.y)) for other in scene.objects]
            assert min(distances) * size < 0.25
    assert right == 500 if size == 64 else right >= 495


def test_the_detector_bears_noise_and_blur():
    world = make("val", 64)
    for index in range(50):
        image, want = world.get(index)["image"], kinds(world.scene(index).objects)
        noise = 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(index))
        assert kinds(detect((image + noise).clamp(-1, 1))) == want
        assert kinds(detect(gaussian_blur(image, 5, 1.0))) == want


def mean_agreement(world, change, count=60):
    rows = [world.agreement(index, change(world.scene(index), world.get(index)["image"])) for index in range(count)]
    return {name: sum(row[name] for row in rows) / count for name in rows[0]}


def test_agreement_of_true_images_is_whole():
    world = make("val", 64)
    figures = mean_agreement(world, lambda scene, image: image, count=300)
    assert figures == dict.fromkeys(["main_color", "colors", "positions", "shapes", "sizes", "count"], 1.0)
    assert world.agreement_definitions.keys() == figures.keys()
    noise = torch.Generator().manual_seed(0)
    noisy = mean_agreement(world, lambda scene, image: image + 0.1 * torch.randn(image.shape, generator=noise))
    assert min(noisy.values()) > 0.99


@pytest.mark.parametrize("sigma_px", [2.0, 3.0, 4.0])
def test_blur_hides_shapes_but_not_colors(sigma_px):
    blurred = mean_agreement(make("val", 64), lambda scene, image: gaussian_blur(image, 25, sigma_px))
    assert {blurred[name] for name in ("main_color", "colors", "positions")} == {1.0}
    assert blurred["shapes"] < 1.0 if sigma_px == 2 else blurred["shapes"] < 0.6


def redrawn(**changes):
    """A scene with every object changed, drawn again."""

    def change(scene, image):
        objects = tuple(
            replace(thing, **{name: new(thing) for name, new in changes.items()}) for thing in scene.objects
        )
        return render(replace(scene, objects=objects), image.shape[-1])

    return change


def test_agreement_sees_each_attribute_alone():
    world, colors = make("val", 64), list(COLORS)
    others = {"main_color", "colors", "positions", "shapes", "sizes", "count"}

    def cycle(names, value, by=1):
        return names[(names.index(value) + by) % len(names)]

    # Two objects may swap colours, not places.
    for change, wrong in (
        (redrawn(color=lambda thing: cycle(colors, thing.color)), {"colors", "main_color"}),
        (redrawn(shape=lambda thing: cycle(SHAPES, thing.shape)), {"shapes"}),
        (redrawn(size=lambda thing: "small"), {"sizes"}),
    ):
        figures = mean_agreement(world, change)
        assert {name for name in others if figures[name] < 0.9} == wrong, figures
    recolored = mean_agreement(world, redrawn(color=lambda thing: cycle(colors, thing.color)))
    assert recolored["colors"] == 0.0
    assert recolored["main_color"] < 0.1


def test_agreement_looks_at_the_place_and_the_number():
    things = (circle(0.3, 0.3, size="large"), square(0.7, 0.7, color="green"))
    scene = shapes.Scene(things, 0.1, "")

    def shown(*objects):
        return shapes.agreement(scene, render(shapes.Scene(objects, 0.1, ""), 64))

    assert set(shown(*things).values()) == {1.0}
    assert shown(things[0])["count"] == 0.0
    assert shown(things[0])["colors"] == shown(things[0])["shapes"] == 0.5
    assert shown(things[1])["main_color"] == 0.0
    moved = shown(replace(things[0], x=0.36), things[1])
    assert (moved["positions"], moved["colors"], moved["main_color"]) == (0.5, 1.0, 1.0)
    away = shown(replace(things[0], x=0.7), things[1])
    assert (away["positions"], away["colors"], away["shapes"], away["main_color"]) == (0.5, 0.5, 0.5, 1.0)
    assert set(shapes.agreement(scene, torch.zeros(3, 64, 64)).values()) == {0.0}


def test_any_of_the_largest_objects_is_the_main_one():
    things = (circle(0.3, 0.3, size="large"), square(0.7, 0.7, color="green", size="large"))
    scene = shapes.Scene(things, 0.1, "")
    for thing in things:
        image = render(shapes.Scene((thing,), 0.1, ""), 64)
        assert shapes.agreement(scene, image)["main_color"] == 1.0


def test_the_detector_finds_nothing_where_nothing_is():
    generator = torch.Generator().manual_seed(0)
    assert detect(torch.zeros(3, 32, 32)) == []
    assert detect(torch.rand(3, 32, 32, generator=generator) * 2 - 1) == []
    # A bar across the image is none of the shapes.
    image = torch.full((3, 32, 32), -0.8)
    image[0, 10:14] = 1
    assert detect(image) == []


def test_the_world_depends_on_seed_split_and_index_alone():
    assert torch.equal(make().get(5)["image"], make().get(5)["image"])
    assert make().scene(5) == make(train_count=10).scene(5)
    assert make().scene(5) != make(seed=1).scene(5)
    assert make().scene(5) != make("val").scene(5)
    assert len({make().scene(i).caption + str(make().scene(i).objects) for i in range(200)}) == 200


def test_held_out_pairs_are_never_trained_on_and_all_validated():
    trained = {(thing.shape, thing.color) for i in range(4000) for thing in make().scene(i).objects}
    validated = {(thing.shape, thing.color) for i in range(1000) for thing in make("val").scene(i).objects}
    everything = {(shape, color) for shape in SHAPES for color in COLORS}
    assert trained == everything - HELD_OUT
    assert validated == everything
    assert len(HELD_OUT) == len({color for _, color in HELD_OUT}) == 6


def test_objects_lie_inside_and_apart():
    for i in range(500):
        objects = make().scene(i).objects
        assert 1 <= len(objects) <= 3
        for n, a in enumerate(objects):
            assert a.radius <= min(a.x, a.y, 1 - a.x, 1 - a.y)
            for b in objects[:n]:
                assert ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 > a.radius + b.radius


def test_captions_are_true():
    """Every word of a caption is checked against the scene it describes."""
    singular = {**{shape: shape for shape in SHAPES}, **{f"{shape}s": shape for shape in SHAPES}, "crosses": "cross"}
    seen = Counter()
    for index in range(1500):
        scene = make().scene(index)
        words = scene.caption.replace(",", "").split()
        named = [singular[word] for word in words if word in singular]
        if words[0] in ("two", "three"):
            assert len(kinds(scene.objects)) == 1
            assert len(scene.objects) == {"two": 2, "three": 3}[words[0]]
            assert named == [scene.objects[0].shape]
        else:
            assert named == [thing.shape for thing in scene.objects]
        for name in ("color", "size"):
            said = [word for word in words if word in (COLORS if name == "color" else RADII)]
            assert said in ([], [getattr(thing, name) for thing in scene.objects][: len(named)])
        for relation in RELATIONS:
            if relation in scene.caption:
                assert relation in relations(*(thing.box for thing in scene.objects))
        seen.update(words)
    assert seen.keys() >= {*COLORS, *RADII, "a", "an", "and", "two", "three", "left", "right", "above", "below"}
    assert make().get(3)["text"] == make().scene(3).caption


def test_the_label_is_the_first_shape():
    world = make()
    for index in range(20):
        assert world.class_names[world.get(index)["label"]] == world.scene(index).objects[0].shape


def circle(x, y, color="red", size="small"):
    return SceneObject("circle", color, size, x, y)


def square(x, y, color="blue", size="small"):
    return SceneObject("square", color, size, x, y)


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_six_tasks_of_geneval(split):
    tasks = make(split).geneval_prompts()
    assert list(tasks) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    for tag, entries in tasks.items():
        assert len({entry["prompt"] for entry in entries}) == len(entries) >= 6
        assert {entry["tag"] for entry in entries} == {tag}
    for tag in ("colors", "color_attr"):
        clauses = [clause for entry in tasks[tag] for clause in entry["include"]]
        assert all(((c["class"], c["color"]) in HELD_OUT) == (split == "val") for c in clauses)
    by_prompt = {entry["prompt"]: entry for entries in tasks.values() for entry in entries}
    assert by_prompt["three crosses"]["exclude"] == [{"class": "cross", "count": 4}]
    position = by_prompt["a circle left of a square"]
    assert position["include"][1] == {"class": "circle", "count": 1, "position": ["left of", 0]}


def test_an_image_is_scored_from_its_pixels():
    things = (circle(0.2, 0.5), square(0.7, 0.5, color="green", size="large"))
    world = make()
    found = world.detections(render(shapes.Scene(things, 0.1, ""), 64))
    entries = [entry for entries in world.geneval_prompts().values() for entry in entries]

    def right(entry):
        return not faults(found, entry, world.geneval_rules, lambda group: [thing.color for thing in group])

    assert {entry["prompt"] for entry in filter(right, entries)} == {
        "a circle",
        "a square",
        "a circle and a square",
        "a square and a circle",
        "a red circle",
        "a green square",
        "a circle left of a square",
        "a square right of a circle",
        "a red circle and a green square",
        "a green square and a red circle",
    }


def test_bad_sizes_are_refused():
    with pytest.raises(UserError, match="at least 24, got 16"):
        make(size=16)
    with pytest.raises(UserError, match="max_objects 1 to 3"):
        make(max_objects=9)
