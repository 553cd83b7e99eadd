#!/usr/bin/env bash
# Installs the attack libraries that tests and benchmarks compare with into .libraries/, apart from the environment:
# torchattacks asks for an old requests and brings a package `robustbench` that would overwrite robustbench. Tests and
# benchmarks append the folder to Python's path, so that the environment's own packages come first.
set -euo pipefail
cd "$(dirname "$0")/.."

# visdom and websocket-client: adv-lib imports them for its plots. visdom's build needs the environment's setuptools.
uv pip install --no-deps --target .libraries --no-build-isolation-package visdom \
    torchattacks==3.5.1 adversarial-robustness-toolbox==1.20.1 advertorch==0.2.3 \
    adv-lib==0.2.8 visdom==0.2.4 websocket-client==1.8.0
