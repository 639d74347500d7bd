import io
import marshal
import textwrap

from dataeff.data.python_facts import read_facts, read_file, serve


def facts(text):
    return read_facts(textwrap.dedent(text).encode())


def test_definitions_nest_and_carry_their_uses():
    definitions, imports = facts('''
        """About."""
        import os.path
        from . import sibling as s

        class A(base.B, C[int]):
            """Doc."""
            @wraps(f)
            async def go(self, x, /, y=default, *rest: T, z, **more) -> R:
                return self.run(x.data, key=y).shape
    ''')
    module, a, go = definitions
    assert module[:4] == ("module", -1, "", "About.")
    assert a[:4] == ("class", 0, "A", "Doc.") and a[5] == ["base.B", ""]
    assert go[:3] == ("function", 1, "go") and go[4] == ["wraps"]
    assert go[6] == ["x", "y", "z", "rest", "more"]
    assert go[7] == ["self.run"]
    assert sorted(go[8]) == [".shape", "R", "T", "default", "x.data", "y"]
    assert imports == [("", "os.path", 0), ("os", "os", 0), ("s", "sibling", 1)]


def test_uses_are_listed_once_and_belong_to_the_innermost_definition():
    definitions, _ = facts("""
        def outer():
            f(1); f(2)
            def inner(): g(a, a)
    """)
    assert [d[7] for d in definitions] == [[], ["f"], ["g"]]
    assert definitions[2][8] == ["a"]


def test_what_is_not_python_is_none(tmp_path):
    bad = {
        "syntax": b"def f(:\n",
        "null": b"a = 1\x00",
        "encoding": b"# -*- coding: no-such-codec -*-\n",
        "not_utf8": b"x = '\xff\xfe'\n",
    }
    for name, text in bad.items():
        path = tmp_path / f"{name}.py"
        path.write_bytes(text)
        assert read_file(str(path)) is None, name
    assert read_file(str(tmp_path / "missing.py")) is None


def test_a_declared_encoding_is_honoured(tmp_path):
    path = tmp_path / "latin.py"
    path.write_bytes("# -*- coding: latin-1 -*-\n'''é'''\ndef g(): pass\n".encode("latin-1"))
    read = read_file(str(path))
    assert read is not None and read[0][0][3] == "é" and read[0][1][2] == "g"


def test_serve_answers_each_request(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("def f(): pass\n")
    requests = io.BytesIO(marshal.dumps([str(path), "missing"]) + marshal.dumps([]))
    answers = io.BytesIO()
    serve(requests, answers)
    answers.seek(0)
    assert marshal.load(answers) == [read_file(str(path)), None]
    assert marshal.load(answers) == []
