#!/bin/bash
# Builds the wheel and the source archive, and installs each way that users may, each in an environment of its own:
# the core alone, the core and each extra, all at the lowest versions of their bounds. `make package-test` runs it.
#
#   scripts/package_test.sh [NAME...]     only these of: core embedded train data eval library serve lm-eval ray lowest
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
names=("$@")
[ $# -gt 0 ] || names=(core embedded train data eval library serve lm-eval ray lowest)

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet --disable-pip-version-check build
# The wheel is built from the source archive, so that the archive is known to hold all that is needed.
"$work/build/bin/python" -m build --outdir "$work/dist" . > "$work/build.log" || { cat "$work/build.log"; exit 1; }
wheel=$(ls "$work"/dist/*.whl)
ls -l "$work"/dist

for name in "${names[@]}"; do
    env=$work/$name
    "$python" -m venv "$env"
    pip=("$env/bin/pip" install --quiet --disable-pip-version-check)
    case $name in
        core) "${pip[@]}" -c constraints.txt torch "$wheel" ;;
        lowest) "$python" scripts/lowest_versions.py > "$work/lowest.txt"
                "${pip[@]}" -c "$work/lowest.txt" "$wheel[embedded,train,data,eval,library,ray,serve]" ;;
        *) "${pip[@]}" -c constraints.txt torch "$wheel[$name]" ;;
    esac
    # Away from the checkout, whose own package would be found first.
    (cd "$work" && "$env/bin/t2l" --version && "$env/bin/t2l" generate --help > /dev/null &&
        "$env/bin/python" "$OLDPWD/scripts/package_check.py" "$name")
    "$env/bin/pip" check
    du -sh "$env" | cut -f1 | sed "s/^/$name: done, an environment of /"
    rm -rf "$env"
done
