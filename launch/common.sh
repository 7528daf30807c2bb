# shellcheck shell=bash
# shellcheck disable=SC2034  # launchers read what is set here
# What the launchers share: arguments, checks, quoting. Sourced, not run.
#
# A launcher sets USAGE and the associative arrays OPTIONS (name to default) and SWITCHES (name to nothing), then calls
# `parse "$@"`. That fills both, CONFIG, WORKDIR, OVERRIDES (passed on to dccot), STAGES
# (to dccot run alone), EXTRA (what stood after --), VERB and DRY_RUN.

PROGRAM=launch/$(basename -- "$0")
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
CONFIG='' WORKDIR='' DRY_RUN='' VERB=run
OVERRIDES=() STAGES=() EXTRA=()

# Print one line and leave: an input that cannot work.
fail() {
  printf '%s: %s\n' "$PROGRAM" "$1" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || fail "bash 4.4 or newer is needed, this is $BASH_VERSION"
declare -A OPTIONS=() SWITCHES=()

usage() {
  printf '%s\n' "$USAGE" '' \
    'As for dccot run:' \
    '  --config FILE.py[:ARG]   the run; --workdir DIR: where its artifacts go' \
    '  --config.a.b=VALUE       change a value; also --until=STAGE, --only=STAGE' \
    'Of every launcher:' \
    '  --doctor                 run dccot doctor there in place of dccot run: devices, versions, collectives, storage' \
    '  --dry-run                print what would be run; contacts nothing, needs no tool' \
    'A restart of the same command goes on where the run stopped.'
}

# parse ARGUMENT...: options as --name=value or --name value.
parse() {
  local argument
  for argument; do
    [[ $argument != *[[:cntrl:]]* ]] || fail "a line break or control character in the argument $(printf %q "$argument")"
  done
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      --doctor) VERB=doctor ;;
      --)
        shift
        EXTRA=("$@")
        return
        ;;
      --config.*=*) OVERRIDES+=("$1") ;;
      --config.*) fail "$1: write $1=VALUE" ;;
      --*=*) set_option "${1%%=*}" "${1#*=}" ;;
      --*)
        if is_one_of "$1" SWITCHES; then
          SWITCHES[${1#--}]=1
        else
          [[ $# -gt 1 && $2 != --* ]] || fail "$1 is unknown or needs a value; see $PROGRAM --help"
          set_option "$1" "$2"
          shift
        fi
        ;;
      *) fail "unexpected argument $(quote "$1"); see $PROGRAM --help" ;;
    esac
    shift
  done
}

set_option() {
  case $1 in
    --config) CONFIG=$2 ;;
    --workdir) WORKDIR=$2 ;;
    --until | --only) STAGES+=("$1=$2") ;;
    *)
      is_one_of "$1" OPTIONS || fail "unknown option $(quote "$1"); see $PROGRAM --help"
      OPTIONS[${1#--}]=$2
      ;;
  esac
}

# is_one_of --NAME ARRAY: whether the associative array has the key NAME.
is_one_of() {
  local -n keys=$2
  local key
  for key in "${!keys[@]}"; do
    [[ $1 != "--$key" ]] || return 0
  done
  return 1
}

# need NAME VARIABLE: the option must have a value; VARIABLE is the environment variable that could have given it.
need() {
  [[ -n ${OPTIONS[$1]} ]] || fail "--$1 is needed${2:+ (or the environment variable $2)}; see $PROGRAM --help"
}

# need_number NAME: a whole number of at least 1.
need_number() {
  [[ ${OPTIONS[$1]} =~ ^[1-9][0-9]{0,5}$ ]] || fail "--$1=${OPTIONS[$1]} must be a whole number of at least 1"
}

# need_name: the name of a cloud resource or job.
need_name() {
  [[ ${OPTIONS[name]} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "--name=${OPTIONS[name]} must be at most 40 small letters, digits and hyphens, a letter first and no hyphen last"
}

# need_tool COMMAND WHAT: on the PATH, unless nothing will be run.
need_tool() {
  [[ -n $DRY_RUN ]] || command -v "$1" >/dev/null || fail "$1 is not on the PATH; $2"
}

need_config() {
  [[ -n $CONFIG ]] || fail '--config=FILE.py is needed'
  [[ -f ${CONFIG%%:*} ]] || fail "--config=${CONFIG%%:*}: no such file"
}

# For hosts that get a copy of this checkout: the config must be in it. CONFIG becomes its path from there.
need_config_in_checkout() {
  need_config
  local file=${CONFIG%%:*} argument folder
  argument=${CONFIG#"$file"}
  folder=$(cd -- "$(dirname -- "$file")" && pwd -P)
  file=${folder%/}/$(basename -- "$file")
  [[ $file == "$ROOT"/* ]] || fail "--config=${CONFIG%%:*} is outside $ROOT, and the hosts get only what is inside"
  CONFIG=${file#"$ROOT"/}$argument
}

need_workdir() {
  [[ -n $WORKDIR ]] || fail '--workdir=DIR is needed'
}

# A spelling that names the same place on every host.
need_shared_workdir() {
  need_workdir
  local accepted='give the absolute path of a disk that all hosts mount, or gs://BUCKET/PATH'
  case $WORKDIR in
    file:* | /tmp | /tmp/* | /var/tmp | /var/tmp/* | /dev/shm | /dev/shm/*) fail "--workdir=$WORKDIR: every host has its own; $accepted" ;;
    [a-z]*://?* | /*) ;;
    *) fail "--workdir=$WORKDIR is not the same place on every host; $accepted" ;;
  esac
}

# quote STRING: as one word of a POSIX shell.
quote() {
  local rest=$1 out=''
  if [[ $rest =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
    printf '%s' "$rest"
    return
  fi
  while [[ $rest == *\'* ]]; do
    out+="${rest%%\'*}'\\''"
    rest=${rest#*\'}
  done
  printf "'%s'" "$out$rest"
}

# quoted WORD...: a command line.
quoted() {
  local word separator=''
  for word; do
    printf '%s%s' "$separator" "$(quote "$word")"
    separator=' '
  done
}

# json STRING: as a JSON string, which is a YAML string too.
json() {
  local text=$1
  text=${text//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

# kubernetes_escaped STRING: Kubernetes would expand $(NAME) in the words of a command; $$ stands for $.
kubernetes_escaped() {
  printf '%s' "${1//\$/\$\$}"
}

# The words that follow `dccot run` (or doctor) on every host, into the array WORDS.
dccot_words() {
  WORDS=("$VERB" "$@" "--config=$CONFIG" "--workdir=$WORKDIR" "${OVERRIDES[@]}")
  [[ $VERB != run ]] || WORDS+=("${STAGES[@]}")
}

# run WORD...: run the command, or print it in a dry run.
run() {
  if [[ -n $DRY_RUN ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# setup_command EXTRA: one line that makes .venv in a copy of the checkout. Images of hosts often have an older Python, so uv gets one.
setup_command() {
  local storage=''
  case $WORKDIR in
    gs://*) storage=' gcsfs' ;;
    s3://*) storage=' s3fs' ;;
    az://*) storage=' adlfs' ;;
  esac
  printf '%s' "python3 -m pip install -q --user uv && python3 -m uv venv -q --allow-existing --python 3.12 .venv" \
    " && python3 -m uv pip install -q --python .venv/bin/python -e '.[$1]'$storage -c constraints/3.12.txt"
}
