#!/usr/bin/env bash
# The whole method: data, the four stages, the baselines, tables 1 to 3 and figures 3 and 4.
#
#   bash run_all.sh                                        # two synthetic domains, minutes, no GPU needed
#   SOURCE=gta5 TARGET=cityscapes bash run_all.sh          # the paper's settings on real data
#   SOURCE=gta5 TARGET=photos METHODS=fastcut_l5 bash run_all.sh     # CLADA alone, on a folder of photographs without labels
#   SETTINGS=small SOURCE=... TARGET=... bash run_all.sh    # smaller networks: minutes on a GPU, hours on two CPU cores
#   SETTINGS=demo SOURCE=... TARGET=... bash run_all.sh     # the demo's tiny networks: minutes for a few hundred frames
#   bash run_all.sh test                                   # the tests
#
# When run again, it skips what is finished and resumes the rest. Variables, all optional:
#   SETTINGS           paper, small or demo (demo without SOURCE and TARGET, paper with them)
#   OUT                where everything goes (runs/demo; with SOURCE and TARGET runs/paper, runs/small or, for demo, runs/quick)
#   METHODS            translators, of: cyclegan cut fastcut fastcut_l5 colour (default: cyclegan cut fastcut_l5)
#                      colour is a control: colour statistics of the target's photographs, without training
#   ORACLE             no: leave out the Oracle and table 3 (yes; without labels of the target it is left out anyway)
#   SEED               (0)
#   ITERATIONS_SCALE   factor on every iteration count, for a trial run (with an OUT of its own) (1)
#   NPROC              processes per stage, by torchrun, one per GPU; batch sizes are per process (1)
#   TARGET_SPLITS      Cityscapes splits whose photographs stages 1 and 4 and FID use, e.g. train,train_extra (train)
#   CACHE              folder for resized frames, which decode faster (paper, small: OUT/frames, up to 1 MiB per frame; empty: none)
#   WORKERS            processes that load images, for each training process (demo: 0; else one per core, at most 16)
#   EXCLUDE            file with names of frames to leave out, one per line
#   FID_WEIGHTS        for fid.py --weights: published, random, or a file (demo: random; else published)
#   TRANSLATOR_ARGS, SEGMENTER_ARGS, ADAPT_ARGS            further arguments for every call of train_translator.py,
#                      train_segmenter.py, adapt_features.py, quoted as in a shell
#   PYTHON             the Python to use, without any set-up
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi # sh run_all.sh
case $BASH_VERSION in [1-3].* | 4.[0-3].*) echo "run_all.sh: bash 4.4 or newer is needed (on macOS: brew install bash)" >&2 && exit 2 ;; esac
set -euo pipefail
{ # parsed as a whole, so that editing this file does not disturb a run
HERE=$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
[ -f "$HERE/train_translator.py" ] || HERE=$PWD # Slurm runs a copy of this file, in the folder where sbatch was called

fail() { echo "run_all.sh: $*" >&2; exit 2; }
title() { stage=$* && printf '\n== %s\n' "$*"; }
[ -f "$HERE/train_translator.py" ] || fail "its scripts are neither in its own folder nor in $PWD: run it from the repository"

# ---------------------------------------------------------------------------------------------------------------------
# Set-up: the active Python if it has the requirements, else .venv beside this file.

has_requirements() { # PYTHON FILE...: is every package installed, in a version that fits? A newer torch does, too.
    "$1" - "${@:2}" 2>/dev/null <<'END'
import re, sys
from importlib.metadata import version
numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)[:3]]
assert sys.version_info >= (3, 10)
for path in sys.argv[1:]:
    for name, sign, bound in re.findall(r"^([\w-]+)([>=]=|<)([\d.]+)", open(path).read(), re.M):
        assert (numbers(version(name)) < numbers(bound)) == (sign == "<")
END
}

set_up() { # FILE...: requirements files; leaves the Python to use in PYTHON
    if [ -n "${PYTHON:-}" ]; then
        "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' 2>/dev/null ||
            fail "PYTHON=$PYTHON: cannot be run, or lacks torch; pip install -r $HERE/requirements.txt, or unset PYTHON"
        return
    fi
    command -v python3 >/dev/null || fail "python3 is missing; on Debian and Ubuntu: apt install python3 python3-venv"
    if has_requirements python3 "$@"; then PYTHON=python3; return; fi
    PYTHON=$HERE/.venv/bin/python
    if [ -x "$PYTHON" ] && has_requirements "$PYTHON" "$@"; then return; fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "python3 is $(python3 -V), 3.10 or newer is needed"
    title "Set-up: installing the requirements into $HERE/.venv, once"
    [ -x "$PYTHON" ] || python3 -m venv --clear "$HERE/.venv" || fail "python3 -m venv does not work here; on Debian and Ubuntu: apt install python3-venv"
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null # venv was stopped halfway
    local file files=()
    for file in "$@"; do files+=(-r "$file"); done
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "${files[@]}"
}

if [ "${1:-}" = test ]; then
    set_up "$HERE/requirements.txt" "$HERE/tests/requirements.txt"
    cd "$HERE" && exec "$PYTHON" -m pytest "${@:2}"
fi
[ $# -eq 0 ] || fail "takes no argument but test: settings are variables, see the head of this file"

# ---------------------------------------------------------------------------------------------------------------------
# Settings

METHODS=$(echo ${METHODS-cyclegan cut fastcut_l5}) SEED=${SEED:-0} ITERATIONS_SCALE=${ITERATIONS_SCALE:-1} NPROC=${NPROC:-1}
TARGET_SPLITS=${TARGET_SPLITS:-train} ORACLE=${ORACLE:-yes}
case $ORACLE in yes | no) ;; *) fail "ORACLE is $ORACLE: yes or no" ;; esac
case $NPROC in '' | *[!0-9]* | 0*) fail "NPROC is $NPROC: a number of processes is needed, 1 or more" ;; esac
[[ $ITERATIONS_SCALE =~ ^[0-9]*\.?[0-9]*$ && $ITERATIONS_SCALE =~ [1-9] ]] || fail "ITERATIONS_SCALE is $ITERATIONS_SCALE: a positive number is needed, such as 0.01"
for method in $METHODS; do
    case $method in cyclegan | cut | fastcut | fastcut_l5 | colour) ;; *) fail "METHODS contains $method; choose from cyclegan, cut, fastcut, fastcut_l5, colour" ;; esac
done
scaled() { LC_ALL=C awk -v n="$1" -v s="$ITERATIONS_SCALE" 'BEGIN { v = int(n * s + 0.5); print v < 1 ? 1 : v }'; }

if [ -z "${SOURCE:-}${TARGET:-}" ]; then
    SETTINGS=${SETTINGS:-demo} OUT=${OUT:-runs/demo}
    [ "$SETTINGS" = demo ] || fail "SETTINGS is $SETTINGS: without SOURCE and TARGET it can only be demo"
else
    [ -n "${SOURCE:-}" ] && [ -n "${TARGET:-}" ] || fail "set both SOURCE and TARGET, or neither"
    SETTINGS=${SETTINGS:-paper}
    if [ "$SETTINGS" = demo ]; then OUT=${OUT:-runs/quick}; else OUT=${OUT:-runs/$SETTINGS}; fi
fi
# Steps: translate (stage 1), bounds (Source Only, Oracle), segment (the other task models), head_start and adapt (stage 4).
# frame_kib: what a frame takes on disk as PNG, translated or resized. method_mib: at most what a method's checkpoints and
# weights take; Source Only, Oracle, stage 4 and the rest take at most two times that.
case $SETTINGS in
    demo) # everything smaller, for two cores in minutes; Source Only and Oracle take as many steps as CLADA in all
        FID_WEIGHTS=${FID_WEIGHTS:-random}
        translate=450 bounds=480 segment=420 head_start=140 adapt=60 frame_kib=64 method_mib=300
        common=(--workers 0 --log-every 10)
        translator=(--width 256 --crop-size 96 --base-channels 16 --lr 5e-4 --antialias --colour-transfer --save-every 150)
        segmenter=(--width 256 --crop-size 128 --batch-size 4 --save-every 100)
        adapter=("${segmenter[@]}" --lr 1e-3 --discriminator-lr 1e-3)
        segmenter+=(--encoder efficientnet-b0 --encoder-weights none --lr 4e-3)
        readers=(--workers 0)
        ;;
    small) # between the two, with the colour transfer of the demo: too few steps for a translator to move colours by itself
        translate=6000 bounds=4000 segment=4000 head_start=400 adapt=600 frame_kib=256 method_mib=300
        common=(--save-every 500)
        translator=(--width 512 --crop-size 256 --base-channels 32 --antialias --colour-transfer)
        segmenter=(--width 512 --crop-size 256 --batch-size 4)
        adapter=("${segmenter[@]}" --lr 1e-4 --discriminator-lr 1e-3)
        segmenter+=(--encoder efficientnet-b0 --lr 5e-4)
        readers=() CACHE=${CACHE-$OUT/frames}
        ;;
    paper) # every setting is the scripts' default
        translate=400000 bounds=120000 segment=120000 head_start=2000 adapt=18000 frame_kib=1024 method_mib=1024
        common=() translator=() segmenter=() adapter=() readers=() CACHE=${CACHE-$OUT/frames}
        ;;
    *) fail "SETTINGS is $SETTINGS: paper, small or demo" ;;
esac
FID_WEIGHTS=${FID_WEIGHTS:-published}
common+=(--seed "$SEED")
[ -z "${WORKERS:-}" ] || common+=(--workers "$WORKERS") readers+=(--workers "$WORKERS")
cache=()
[ -z "${CACHE:-}" ] || cache=(--cache "$CACHE")
common+=("${cache[@]}")
exclude=()
if [ -n "${EXCLUDE:-}" ]; then
    [ -f "$EXCLUDE" ] || fail "EXCLUDE is $EXCLUDE: no such file"
    exclude=(--exclude "$EXCLUDE") common+=(--exclude "$EXCLUDE")
fi
split() { # NAME TEXT: append the words of TEXT, which may be quoted, to an array
    local -n array=$1
    [ -n "$2" ] || return 0
    command -v xargs >/dev/null || fail "xargs is missing; on Debian and Ubuntu: apt install findutils"
    local words
    words=$(xargs -n 1 printf '%s\n' <<<"$2" 2>/dev/null) || fail "$2: its quotes do not match"
    [ -z "$words" ] || readarray -t -O ${#array[@]} array <<<"$words"
}
split translator "${TRANSLATOR_ARGS:-}"
split segmenter "${SEGMENTER_ARGS:-}"
split adapter "${ADAPT_ARGS:-}"

# Scripts run in the background, so that a signal is passed on at once and they can save their work.
run() { # SCRIPT ARG...
    local started=$SECONDS launcher=()
    # An address, because a container's host name may not resolve.
    [ "$processes" = 1 ] || launcher=(-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$processes")
    "$PYTHON" "${launcher[@]}" "$HERE/$1" "${@:2}" &
    wait $!
    [ -f "$OUT/times.csv" ] || echo script,stage,seconds >"$OUT/times.csv" # for the forecast
    echo "$1,\"$stage\",$((SECONDS - started))" >>"$OUT/times.csv"
}
run_on_all() { processes=$NPROC run "$@"; }
processes=1
stop() { # EXIT_STATUS
    trap '' TERM INT HUP
    local child
    for child in $(jobs -p); do kill -TERM "$child" 2>/dev/null && wait "$child" || true; done
    exit "$1"
}
trap 'stop 143' TERM
trap 'stop 130' INT
trap 'stop 129' HUP
# glibc then keeps freed memory instead of returning it to the kernel and taking it back, cleared, for the next tensor.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:--1}

name_of() { case $1 in cyclegan) echo CycleGAN ;; cut) echo CUT ;; fastcut) echo FastCUT ;; fastcut_l5) echo FastCUT-L5 ;; colour) echo "colour transfer" ;; esac; }
photos_of() { # DATA_SET SPLITS: the folder of its images; of several splits, a folder of links to theirs
    if [ -d "$1/images" ]; then echo "$1/images"; return; fi
    if [ ! -d "$1/leftImg8bit" ]; then echo "$1"; return; fi
    case $2 in *,*) ;; *) echo "$1/leftImg8bit/$2"; return ;; esac
    local links=$OUT/photos/$2
    mkdir -p "$links"
    for split in ${2//,/ }; do ln -sfn "$1/leftImg8bit/$split" "$links/$split"; done
    echo "$links"
}

train_translator() { # METHOD [ARG...]
    [ "$1" != colour ] || return 0
    run_on_all train_translator.py --source "$SOURCE" --target "$TARGET" --target-splits "$TARGET_SPLITS" \
        --out "$OUT/translators/$1" --method "$1" --iterations "$(scaled $translate)" "${common[@]}" "${translator[@]}" "${@:2}"
}
train_segmenter() { # NAME DATA ITERATIONS [ARG...]
    run_on_all train_segmenter.py --data "$2" --out "$OUT/segmenters/$1" --iterations "$(scaled "$3")" \
        "${common[@]}" "${segmenter[@]}" "${@:4}"
}
adapt_features() { # NAME [ARG...]
    local alone && alone=$(scaled $head_start)
    run_on_all adapt_features.py --source "$OUT/translated/fastcut_l5" --target "$TARGET" --target-splits "$TARGET_SPLITS" \
        --segmenter "$OUT/segmenters/fastcut_l5" --out "$OUT/segmenters/$1" --iterations $((alone + $(scaled $adapt))) \
        --head-start "$alone" "${common[@]}" "${adapter[@]}" "${@:2}"
}
evaluate() { # MODEL NAME
    [ $scored = yes ] || return 0
    run_on_all evaluate.py --segmenter "$OUT/segmenters/$2" --data "$TARGET" --split val --name "$1" \
        --skip-done "${readers[@]}" "${exclude[@]}"
}
distance() { # NAME FOLDER [ARG...]
    run fid.py "$2" "$(photos_of "$TARGET" "$TARGET_SPLITS")" --weights "$FID_WEIGHTS" --cache "$OUT/statistics" \
        --out "$OUT/distances/$1.json" "${readers[@]}" "${exclude[@]}" "${@:3}"
}

# ---------------------------------------------------------------------------------------------------------------------
# The experiment

real_path() { # PATH: absolute and without links; it need not exist
    if [ -d "$1" ]; then (CDPATH= cd -P -- "$1" && pwd) && return; fi
    [ ! -L "$1" ] || fail "$1: a link to a folder that does not exist; create that first"
    local parent && parent=$(real_path "$(dirname -- "$1")")
    echo "${parent%/}/$(basename -- "$1")"
}
OUT=$(real_path "$OUT")
if [ -n "${SOURCE:-}" ]; then
    SOURCE=$(real_path "$SOURCE") TARGET=$(real_path "$TARGET")
    case $OUT/ in "$SOURCE"/* | "$TARGET"/*) fail "OUT=$OUT: lies inside SOURCE or TARGET, which are only read" ;; esac
fi
mkdir -p -- "$OUT" 2>/dev/null && [ -w "$OUT" ] || fail "OUT=$OUT: cannot be created or written; give another folder"
is_drawn=no scored=yes oracle=$ORACLE # until the preflight finds no labels
[ -n "${SOURCE:-}" ] || is_drawn=yes SOURCE=$OUT/data/source TARGET=$OUT/data/target
describe=(stat -L -c '%n %s %.Y')
stat -c %s . >/dev/null 2>&1 || describe=(stat -L -f '%N %z %Fm') # BSD and macOS
state() { # a checksum of all that the results depend on, and of what is there: words, code, every file's name, size and time
    local words=("$SETTINGS" "$METHODS" "$SEED" "$ITERATIONS_SCALE" "$NPROC" "$TARGET_SPLITS" "$ORACLE" "$FID_WEIGHTS" "${CACHE:-}")
    words+=("${EXCLUDE:-}" "${common[@]}" "${translator[@]}" "${segmenter[@]}" "${adapter[@]}" "${readers[@]}")
    local word paths=("$SOURCE" "$TARGET" "$OUT" "$HERE"/*.py "$HERE/run_all.sh" "$HERE/demo")
    for word in "${words[@]}"; do [ ! -f "$word" ] || paths+=("$word"); done
    local files && files=$(find -L "${paths[@]}" -type f ! -name .finished -exec "${describe[@]}" {} + 2>/dev/null || true)
    { printf '%s\n' "${words[@]}" && sort <<<"$files"; } | cksum
}
if [ -f "$OUT/.finished" ] && [ "$(state)" = "$(cat "$OUT/.finished")" ]; then
    echo "run_all.sh: finished, and nothing has changed: tables and figures are in $OUT/results"
    exit
fi
set_up "$HERE/requirements.txt"
if [ $is_drawn = yes ]; then
    title "Stage 0: draw two synthetic domains"
    run demo/make_demo_data.py "$OUT/data" --seed "$SEED" --source-count 160 --target-count 100 --val-count 40
else
    title "Preflight: check data, weights and disk"
    if [ -d "$TARGET/leftImg8bit/val" ] && [ -d "$TARGET/gtFine/val" ]; then
        run check_data.py "$TARGET" --split val "${exclude[@]}"
        unix() { tr -d '\r' 2>/dev/null <"$1"; } # whatever its line ends
        tables=("$SOURCE/classes.csv" "$TARGET/classes.csv")
        [ ! -f "${tables[0]}" ] && [ ! -f "${tables[1]}" ] || cmp -s <(unix "${tables[0]}") <(unix "${tables[1]}") || fail "${tables[0]} and ${tables[1]} must be the same"
    else
        scored=no oracle=no
        echo "TARGET=$TARGET: no labelled val split there. Left out: the Oracle, scores, tables 2 and 3; figure 4 becomes predictions"
    fi
    for method in $METHODS; do train_translator "$method" --check; done
    train_segmenter source_only "$SOURCE" $bounds --check
    [ $oracle = no ] || train_segmenter oracle "$TARGET" $bounds --check
    if [[ " $METHODS " == *" fastcut_l5 "* ]]; then adapt_features clada --check; fi
    run fid.py "$(photos_of "$SOURCE" train)" "$(photos_of "$TARGET" "$TARGET_SPLITS")" --weights "$FID_WEIGHTS" --check "${exclude[@]}"
    count() { { find -L "$@" -type f 2>/dev/null || true; } | wc -l; }
    frames=$(count "$(photos_of "$SOURCE" train)") kept=0 free=$(df -Pk "$OUT" | awk 'NR == 2 { print int($4 / 1024) }')
    [ -z "${CACHE:-}" ] || kept=$((frames + $(count "$(photos_of "$TARGET" "$TARGET_SPLITS")")))
    translators=$(wc -w <<<"$METHODS")
    needed=$(((translators * frames + kept) * frame_kib / 1024 + (translators + 2) * method_mib))
    held=$({ du -sk "$OUT" 2>/dev/null || true; } | awk '{ print int($1 / 1024) }') # what an earlier call has written already
    [ $((free + held)) -ge "$needed" ] || fail "OUT=$OUT: about $((needed - held)) MiB are needed on its disk, $((free)) are free"
fi

title "Stage 3: Source Only, the lower bound"
train_segmenter source_only "$SOURCE" $bounds
evaluate "Source Only" source_only
if [ $oracle = yes ]; then
    title "Stage 3: Oracle, the upper bound"
    train_segmenter oracle "$TARGET" $bounds
    evaluate Oracle oracle
fi
title "Distance between source and target"
distance source "$(photos_of "$SOURCE" train)"

for method in $METHODS; do
    model=$(name_of "$method")
    from=(--translator "$OUT/translators/$method")
    if [ "$method" = colour ]; then
        from=(--colours-of "$TARGET" --target-splits "$TARGET_SPLITS" --seed "$SEED")
        for ((i = 0; i < ${#translator[@]}; i++)); do
            case ${translator[i]} in --width) from+=(--width "${translator[i + 1]}") ;; --width=*) from+=("${translator[i]}") ;; esac
        done
    else
        title "Stage 1: $model, the translator"
        train_translator "$method"
    fi
    title "Stage 2: translate the source frames with $model"
    run_on_all translate_dataset.py --source "$SOURCE" "${from[@]}" --out "$OUT/translated/$method" \
        "${readers[@]}" "${cache[@]}" "${exclude[@]}"
    distance "$method" "$OUT/translated/$method/images"
    title "Stage 3: the task model on $model's translations"
    train_segmenter "$method" "$OUT/translated/$method" $segment
    evaluate "$model" "$method"
done

if [ -n "$METHODS" ]; then
    title "Distance between source and target, the source at the translations' width"
    width=$(sed -n 's/.*"width": \([0-9]*\).*/\1/p' "$OUT/translated/$method/args.json")
    distance source_resized "$(photos_of "$SOURCE" train)" --width "$width"
fi

if [[ " $METHODS " == *" fastcut_l5 "* ]]; then
    title "Stage 4: CLADA, the task model on FastCUT-L5's translations fine-tuned against a feature discriminator"
    adapt_features clada
    evaluate CLADA clada
    title "Stage 4: a control, the same fine-tuning without the adversary"
    adapt_features control --adversarial-weight 0
    evaluate control control
    title "Stage 4: a second control, also without target frames: more steps alone"
    adapt_features no_target --no-target
    evaluate "control without target" no_target
else
    title "Stage 4 left out: it needs fastcut_l5, which is not among METHODS ($METHODS)"
fi

if [ $scored = no ]; then
    last=source_only
    for name in $METHODS clada; do [ ! -f "$OUT/segmenters/$name/weights.pt" ] || last=$name; done
    title "Predictions of $last for a sample of TARGET, in $OUT/results/predictions"
    rm -rf "$OUT/results/predictions"
    run predict.py --segmenter "$OUT/segmenters/$last" --images "$TARGET" --split "$TARGET_SPLITS" --sample 8 --overlay \
        --out "$OUT/results/predictions" "${readers[@]}" "${exclude[@]}"
fi
title "Tables and figures, in $OUT/results"
run report.py "$OUT" --scale "$ITERATIONS_SCALE"
state >"$OUT/.finished"
exit
}
