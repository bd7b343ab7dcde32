import pytest

from models.refs import ModelRef, check_alias, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models:/liver@champion", ModelRef("liver", alias="champion")),
        ("models:/liver/3", ModelRef("liver", version=3)),
        ("liver@champion", ModelRef("liver", alias="champion")),
        ("liver/3", ModelRef("liver", version=3)),
        ("liver", ModelRef("liver")),
        ("liver/latest", ModelRef("liver")),
        ("liver@latest", ModelRef("liver")),
        ("liver@v3", ModelRef("liver", version=3)),
        ("a" + "b" * 99, ModelRef("a" + "b" * 99)),
        ("ct.liver_v2-small", ModelRef("ct.liver_v2-small")),
    ],
)
def test_every_form_of_a_reference_is_read(text, expected):
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "model name"),
        ("Liver", "model name"),
        ("../liver", "model name"),
        (".liver", "model name"),
        ("a" * 101, "model name"),
        ("models:/", "model name"),
        ("mlflow:/liver", "model name"),
        ("liver/", "version"),
        ("liver/0", "version"),
        ("liver/03", "version"),
        ("liver/3/4", "version"),
        ("liver/champion", "version"),
        ("liver@", "alias"),
        ("liver@a@b", "alias"),
        ("liver@Champion", "alias"),
        ("liver@v0", "version"),
        ("liver\n", "model name"),
    ],
)
def test_a_malformed_reference_is_refused_naming_the_wrong_part(text, part):
    with pytest.raises(ValueError, match=f"^{part}"):
        parse(text)


@pytest.mark.parametrize("alias", ["latest", "v1", "v20"])
def test_names_of_versions_cannot_be_set_as_aliases(alias):
    with pytest.raises(ValueError, match="reserved"):
        check_alias(alias)


@pytest.mark.parametrize("alias", ["champion", "v1-candidate", "vx", "latest-good"])
def test_other_aliases_can_be_set(alias):
    assert check_alias(alias) == alias
