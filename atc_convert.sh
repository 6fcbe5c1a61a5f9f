#!/usr/bin/env bash
# Convert the ONNX of intrada_pth2onnx.py with ATC, one .om for each batch size. Runs where CANN is installed.
# usage: atc_convert.sh [ONNX] [BS ...] [options] [-- ATC_OPTION ...]
#   ONNX                default: intraDA_deeplabv2.onnx; becomes intraDA_deeplabv2_bs${BS}.om
#   BS ...              default: 1 4 8 16 32 64
#   --soc_version NAME  the chip, as 310P3 or Ascend310P3 (default: what npu-smi info shows)
#   --output_dir DIR    where the .om files go (default: the current folder)
#   --overwrite         make all anew, not only what is missing or older than the ONNX
#   --dry_run           print the commands and run none
#   -- ATC_OPTION ...   goes to atc as it is, for example -- --precision_mode_v2=mixed_float16
set -Eeuo pipefail
umask 022 # newer ais_bench refuses group-writable models

die() { echo "atc_convert.sh: error: $*" >&2 && exit 1; }
usage() { echo "atc_convert.sh: error: $*; see --help" >&2 && exit 2; }
show() { printf '%q ' "$@" | sed 's/\\\([,:=]\)/\1/g; s/ $/\n/'; } # as it can be pasted

parse_args() {
  onnx='' output_dir=. soc_version='' overwrite='' dry_run='' batch_sizes=() atc_options=()
  while (($#)); do
    case $1 in
      -h | --help) sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}" && exit ;;
      --soc_version | --output_dir) (($# > 1)) || usage "$1 wants a value"; printf -v "${1#--}" %s "$2"; shift ;;
      --soc_version=?* | --output_dir=?*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
      --overwrite | --dry_run) printf -v "${1#--}" yes ;;
      --) shift; atc_options=("$@"); break ;;
      *.onnx) [[ ! $onnx ]] || usage "two models, $onnx and $1"; onnx=$1 ;;
      *) [[ $1 =~ ^[1-9][0-9]*$ ]] || usage "neither an option, a batch size nor an .onnx: $1"; batch_sizes+=("$1") ;;
    esac
    shift
  done
  onnx=${onnx:-intraDA_deeplabv2.onnx}
  ((${#batch_sizes[@]})) || batch_sizes=(1 4 8 16 32 64)
}

choose_chip() { # in npu-smi's table, the row of a number and the name in the first cell and the health in the second
  local chips
  if [[ ! $soc_version ]]; then
    chips=$(npu-smi info 2>/dev/null | awk -F'|' '$3 ~ /^ *(OK|Warning|Alarm|Critical|UNKNOWN) *$/ &&
      split($2, cell, " ") == 2 && cell[1] ~ /^[0-9]+$/ && !seen[cell[2]]++ { print cell[2] }') || true
    [[ $chips ]] || die "npu-smi info shows no chip; say which one the model is for, as --soc_version 310P3"
    soc_version=${chips%%$'\n'*}
    [[ $chips = "$soc_version" ]] || echo "warning: different chips (${chips//$'\n'/, }): taking $soc_version" >&2
  fi
  [[ ${soc_version,,} != ascend* ]] || soc_version=${soc_version:6}
  [[ ! $soc_version =~ ^[0-9]+[a-z][0-9]*[a-z]?$ ]] || soc_version=${soc_version^^} # 310p3; but 910ProA stays
  soc_version=Ascend$soc_version
}

find_atc() {
  local script
  for script in {/usr/local,"${HOME:-}"}/Ascend/{cann,ascend-toolkit}/set_env.sh; do
    command -v atc >/dev/null || [[ ! -f $script ]] && continue
    set +eu # set_env.sh reads variables that may be unset
    # shellcheck source=/dev/null
    source "$script"
    set -eu
  done
  command -v atc >/dev/null || die "no atc on PATH nor by a set_env.sh below /usr/local/Ascend or ~/Ascend; install CANN"
}

check_path() { # atc takes letters, digits, . _ - / and Chinese characters
  local strange
  strange=$(LC_ALL=C sed 's/[A-Za-z0-9._/-]//g; s/[\xe4-\xe9][\x80-\xbf][\x80-\xbf]//g' <<<"$1")
  [[ ! $strange ]] || die "$1: atc refuses '$strange' in a path; only letters, digits and . _ - / will do"
}

advice() {
  case $1 in
    E10001) echo "a bad value, path or chip: look at --soc_version and at what stands behind --" ;;
    E10007 | E10054) echo "an argument is missing or unquoted: look at what stands behind --" ;;
    E10016) echo "the ONNX's input must be called image: export it with intrada_pth2onnx.py" ;;
    E10041) echo "the ONNX cannot be read: export it again, copy it whole" ;;
    E19010 | EZ9010) echo "an operator or opset that this CANN does not know: export with --opset 11" ;;
    EZ3002 | EZ3003) echo "not on this chip: install the ops package of $soc_version (CANN 8.5 and later)" ;;
    EC0010 | E40000) echo "pip3 install decorator attrs scipy sympy cffi psutil 'numpy<2'" ;;
    EL0004) echo "out of memory: take a smaller batch size" ;;
    *) echo "the log tells more" ;;
  esac
}

convert() { # in a scratch folder, as atc litters the current one; the .om takes its name only when it is whole
  local name=$1 status=0 made line log=${ASCEND_PROCESS_LOG_PATH:-${ASCEND_WORK_PATH:-${HOME:-}/ascend}/log}
  (mkdir -p "$scratch/$name" && cd "$scratch/$name" && "${@:2}" 2>&1 | tee "$scratch/atc.out" >&2) || status=$?
  made=$(compgen -G "$scratch/$name/${name}*.om" | head -n 1) || true
  ((status)) || [[ ! $made ]] || { mv -f "$made" "$output_dir/$name.om" && return; }
  line=$(grep -a -m 1 -E '^E[A-Z]?[0-9]{4}' "$scratch/atc.out") || line="atc ended with status $status and left no .om"
  ((status < 129 || status == 255)) || line="atc was ended by signal $((status - 128))"
  failure="$line ($(advice "${line%%[!A-Z0-9]*}"); log: $log)"
  return 1
}

main() {
  parse_args "$@"
  local bs stem shown='' name om command failure failed=0 summary=()
  [[ -f $onnx && -r $onnx ]] || die "$onnx: no such file; export it with intrada_pth2onnx.py"
  stem=$(basename "$onnx" .onnx) onnx=$(realpath "$onnx") output_dir=$(realpath -m "$output_dir")
  [[ $output_dir = "$(pwd -P)" ]] || shown=$output_dir/ # so that what is pasted writes there too
  check_path "$onnx" && check_path "$output_dir" && check_path "$stem" && choose_chip
  if [[ ! $dry_run ]]; then
    find_atc
    scratch=$(mkdir -p "$output_dir" && mktemp -d "$output_dir/.atc.XXXXXX") || die "$output_dir: cannot be written"
    trap 'rm -rf "$scratch"' EXIT
  fi
  for bs in "${batch_sizes[@]}"; do
    name=${stem}_bs$bs && om=$output_dir/$name.om
    command=(atc "--model=$onnx" --framework=5 "--output=$name" --input_format=NCHW "--input_shape=image:$bs,3,512,1024"
      --log=error "--soc_version=$soc_version" ${atc_options[@]+"${atc_options[@]}"})
    if [[ $om -nt $onnx && ! $overwrite ]]; then
      summary+=("bs $bs: kept $om")
    elif show "${command[@]/#--output=/--output=$shown}" && [[ ! $dry_run ]]; then
      convert "$name" "${command[@]}" && summary+=("bs $bs: made $om") || failed=1 summary+=("bs $bs: FAILED: $failure")
    fi
  done
  ((!${#summary[@]})) || printf '%s\n' "${summary[@]}"
  return $failed
}

main "$@"
