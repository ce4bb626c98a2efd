#!/bin/bash
# Builds the wheel and the source archive, and installs each way that users may, each in an environment of its own:
# the core alone, the core and each extra, all at the lowest versions of their bounds. `make package-test` runs it.
#
#   scripts/package_test.sh [NAME...]     only these of: core embedded train data eval library serve lm-eval ray lowest
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
names=("$@")
[ $# -gt 0 ] || names=(core embedded train data eval library serve lm-eval ray lowest)

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet --disable-pip-version-check build
# From a copy, as builds leave folders behind; and the wheel from the source archive, which is so known to be whole.
mkdir "$work/source"
git ls-files -z | xargs -0 cp --parents --target-directory "$work/source"
"$work/build/bin/python" -m build --outdir "$work/dist" "$work/source" > "$work/build.log" || { cat "$work/build.log"; exit 1; }
wheel=$(ls "$work"/dist/*.whl)
ls -l "$work"/dist

for name in "${names[@]}"; do
    SECONDS=0
    env=$work/$name
    "$python" -m venv "$env"
    pip=("$env/bin/pip" install --quiet --disable-pip-version-check)
    extras=$name
    case $name in
        core) extras= && "${pip[@]}" -c constraints.txt torch "$wheel" ;;
        lowest) "$python" scripts/requirements.py lowest > "$work/lowest.txt"
                extras=embedded,train,data,eval,library,lm-eval,ray,serve,docs
                "${pip[@]}" -c "$work/lowest.txt" "$wheel[$extras]" ;;
        *) "${pip[@]}" -c constraints.txt torch "$wheel[$name]" ;;
    esac
    "$env/bin/pip" check
    # Away from the checkout, whose own package would be found first.
    cd "$work"
    "$env/bin/t2l" --version
    "$env/bin/t2l" generate "Name the city in the sentence." -o "$name-adapter"
    "$env/bin/python" "$here/scripts/package_check.py" "$name"
    "$env/bin/python" "$here/scripts/licences.py" ${extras//,/ } > licences.txt || { cat licences.txt; exit 1; }
    echo "$name: $(wc -l < licences.txt) packages, whose licences go with ours"
    [ "$name" != embedded ] || "$env/bin/t2l" run --adapter "$name-adapter" --input "It rained in Oslo."
    if [ "$name" = lowest ]; then
        # The copy's tests: those of the checkout may by now be newer than the wheel.
        cd "$work/source"
        "${pip[@]}" -c "$work/lowest.txt" pytest pytest-xdist hypothesis openai httpx playwright
        # The page of commands is compared as the Typer of constraints.txt writes it.
        "$env/bin/python" -m pytest -q -n 2 --dist loadfile -m "not slow" \
            --deselect tests/test_docs.py::test_the_command_line_is_documented_as_it_is
    fi
    cd "$here"
    echo "$name: done in $SECONDS s, an environment of $(du -sh "$env" | cut -f1)"
    rm -rf "$env"
done
