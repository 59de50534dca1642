#!/bin/sh
# AIPerf and guidellm, unmodified, against a running fly-serve: the demo pair's evaluation prompts, greedy, streamed.
# usage: tools/load_generators.sh URL TOKENIZER_FOLDER [IN_FLIGHT [REQUESTS [MAX_TOKENS]]]
# Both are installed from PyPI into environments of their own under .load-generators/, which also gets their reports.
# Their tokenizer is a folder, the engine directory's own: nothing is fetched from a model hub.
set -eu
url=${1:?URL of fly-serve, such as http://127.0.0.1:8000}
tokenizer=$(realpath "${2:?folder with tokenizer.json, such as engines/demo/tokenizer}")
in_flight=${3:-8} requests=${4:-24} max_tokens=${5:-160}
root=$(realpath "$(dirname "$0")/..")
work=$root/.load-generators
mkdir -p "$work"
cd "$work"

install() { # NAME VERSION
    [ -x "$1/bin/$1" ] && return
    "${PYTHON:-python3}" -m venv "$1"
    "$1/bin/pip" install --quiet "$1==$2"
}

install aiperf 0.13.0
install guidellm 0.8.1
model=$(aiperf/bin/python -c '
import json, sys, urllib.request
print(json.load(urllib.request.urlopen(sys.argv[1] + "/v1/models"))["data"][0]["id"])' "$url")
aiperf/bin/python - "$root/tests/assets/pair/eval.jsonl" "$requests" <<'PYTHON'
import itertools, json, sys

with open(sys.argv[1]) as file:
    prompts = [json.loads(line)["prompt"] for line in itertools.islice(file, int(sys.argv[2]))]
for name, field in (("aiperf", "text"), ("guidellm", "prompt")):
    with open(f"{name}.jsonl", "w") as out:
        out.writelines(json.dumps({field: prompt}) + "\n" for prompt in prompts)
PYTHON

aiperf/bin/aiperf profile --model "$model" --url "$url" --endpoint-type completions --streaming --tokenizer "$tokenizer" \
    --input-file aiperf.jsonl --custom-dataset-type single_turn --dataset-sampling-strategy sequential \
    --extra-inputs temperature:0 --extra-inputs "max_tokens:$max_tokens" \
    --concurrency "$in_flight" --request-count "$requests" --workers-max 1 --record-processor-service-count 1 \
    --no-gpu-telemetry --ui none --output-artifact-dir aiperf-report
guidellm/bin/guidellm run --disable-progress \
    --backend "{\"kind\": \"openai_http\", \"target\": \"$url\", \"model\": \"$model\", \"request_format\": \"/v1/completions\",
        \"max_tokens\": $max_tokens, \"extras\": {\"body\": {\"temperature\": 0}}}" \
    --profile "kind=concurrent,streams=$in_flight" --constraint "kind=max_requests,count=$requests" \
    --tokenizer "kind=hf_auto,model=$tokenizer" --data "kind=json_file,path=$work/guidellm.jsonl" \
    --output kind=console --output "kind=json,path=$work/guidellm-report.json"
