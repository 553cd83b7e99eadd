#!/usr/bin/env bash
# Collects into FOLDER the photographs that tasks/classification/photographs.yaml lists: those of Debian packages, which
# are unpacked and not installed, and those of scikit-image. Run it in the project's environment (uv run bash ...).
set -euo pipefail
folder=$(realpath -m "${1:?usage: tools/photographs.sh FOLDER}")
list=$(realpath "$(dirname "$0")/../tasks/classification/photographs.yaml")
data=$(python -c 'import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / "data")')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

sed -n 's/^\(.*\):$/\1/p' "$list" | grep -v '^scikit-image$' | xargs apt-get download
for package in *.deb; do dpkg-deb -x "$package" tree; done

mkdir -p "$folder"
sed -n 's/^  \(.*\): \([0-9a-f]\{64\}\)$/\2  \1/p' "$list" > sums
while read -r _ name; do
    find tree "$data" -name "$name" -exec cp {} "$folder" \; -quit
done < sums
cd "$folder" && sha256sum --check --quiet "$work/sums" && echo "$(wc -l < "$work/sums") photographs in $folder"
