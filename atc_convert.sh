#!/usr/bin/env bash
# Convert the ONNX of intrada_pth2onnx.py with ATC, one .om per batch size. Runs where CANN is installed.
# usage: atc_convert.sh [ONNX] [BS ...] [options] [-- ATC_OPTION ...]
#   ONNX                default: intraDA_deeplabv2.onnx; becomes intraDA_deeplabv2_bs${BS}.om
#   BS ...              default: 1 4 8 16 32 64
#   --soc_version NAME  chip, e.g. 310P3 or Ascend310P3 (default: what npu-smi info shows)
#   --output_dir DIR    folder for the .om files (default: the current one)
#   --dry_run           print the commands and run none
#   -- ATC_OPTION ...   passed to atc unchanged, e.g. -- --precision_mode=force_fp32
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@" # started as `sh atc_convert.sh`
set -Eeuo pipefail
umask g-w,o-w # newer ais_bench rejects group-writable models

die() { echo "atc_convert.sh: error: $*" >&2; exit 1; }
usage() { echo "atc_convert.sh: error: $*; see --help" >&2; exit 2; }
show() { printf '%q ' "$@" | sed 's/\\\([,:=]\)/\1/g; s/ $/\n/'; } # so that it can be pasted

parse_args() {
  onnx='' output_dir=. soc_version='' dry_run='' batch_sizes=() atc_options=()
  while (($#)); do
    case $1 in
      -h | --help) sed -n '2,/^\[/{/^\[/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}" && exit ;;
      --soc_version | --output_dir)
        [[ ${2-} && $2 != --* ]] || usage "$1 needs a value"
        printf -v "${1#--}" %s "$2"; shift ;;
      --soc_version=?* | --output_dir=?*) set -- "${1%%=*}" "${1#*=}" "${@:2}" && continue ;;
      --dry_run) dry_run=yes ;;
      --) shift; atc_options=("$@"); break ;;
      *.onnx) [[ ! $onnx ]] || usage "two models, $onnx and $1"; onnx=$1 ;;
      --*=*) usage "not an option of this script: $1; what is meant for atc follows --: -- $1" ;;
      *) [[ $1 =~ ^[1-9][0-9]*$ ]] || usage "not an option, a batch size or an .onnx: $1"; batch_sizes+=("$1") ;;
    esac
    shift
  done
  onnx=${onnx:-intraDA_deeplabv2.onnx}
  ((${#batch_sizes[@]})) || batch_sizes=(1 4 8 16 32 64)
}

name_chip() { # Ascend310P3 from 310P3, ascend310p3 and the like; Ascend910ProA stays
  local name=$1
  [[ ${name,,} != ascend* ]] || name=${name:6}
  [[ $name == *[[:upper:]]* ]] || name=${name^^}
  echo "Ascend$name"
}

find_chip() { # in npu-smi's table, the row with a number and the name in the first cell and the health in the second
  local name
  name=$(npu-smi info 2>/dev/null | awk -F'|' '$3 ~ /^ *(OK|Warning|Alarm|Critical|UNKNOWN) *$/ &&
    split($2, cell, " ") == 2 && cell[1] ~ /^[0-9]+$/ { print cell[2]; exit }') || true
  [[ $name ]] || die "npu-smi info shows no chip; pass it, e.g. --soc_version 310P3"
  [[ $name != Ascend910 ]] || die "npu-smi info shows only Ascend910; \`npu-smi info -t board -i 0 -c 0\` shows the" \
    "full name, <Chip Name>_<NPU Name>; pass it, e.g. --soc_version Ascend910_9391"
  echo "$name"
}

tell_earlier() { [[ ! -e $om.old ]] || echo "; the earlier one is $om.old"; }

main() {
  parse_args "$@"
  local prefix bs old om command caught='' problem failed=0 summary=()
  [[ $dry_run ]] || command -v atc >/dev/null || die "no atc on PATH; source CANN's set_env.sh first (README.md, step 3)"
  [[ -f $onnx ]] || die "$onnx: no such file; export it with intrada_pth2onnx.py"
  [[ $soc_version ]] || soc_version=$(find_chip)
  prefix=$output_dir/$(basename "$onnx" .onnx)_bs
  prefix=${prefix#./}
  if [[ ! $dry_run ]]; then
    for bs in "${batch_sizes[@]}"; do
      om=$prefix$bs.om
      [[ ! -e $om || ! -e $om.old ]] || die "$om.old of a failed conversion and a newer $om: remove one of them"
    done
    mkdir -p "$output_dir"
    trap 'caught=HUP' HUP; trap 'caught=INT' INT; trap 'caught=TERM' TERM # while atc runs, bash waits for its end
  fi
  for bs in "${batch_sizes[@]}"; do
    om=$prefix$bs.om
    command=(atc "--model=$onnx" --framework=5 "--output=${om%.om}" --input_format=NCHW
      "--input_shape=image:$bs,3,512,1024" --log=error "--soc_version=$(name_chip "$soc_version")"
      ${atc_options[@]+"${atc_options[@]}"})
    show "${command[@]}" || [[ $caught ]]
    [[ ! $dry_run ]] || continue
    [[ ! $caught ]] || { summary+=("bs $bs: interrupted") && break; }
    old=$(tell_earlier) # which a success replaces
    [[ ! -e $om ]] || mv "$om" "$om.old" # or it would pass for this run's
    if "${command[@]}" >&2 && [[ -f $om ]]; then
      rm -f "$om.old"
      summary+=("bs $bs: made $om${old:+; removed $om.old}")
    else
      rm -f "$om"
      failed=1 problem="FAILED, see atc's messages above and docs/ascend.md"
      [[ ! $caught ]] || problem="interrupted, no .om"
      summary+=("bs $bs: $problem$(tell_earlier)")
    fi
    [[ ! $caught ]] || break
  done
  [[ $dry_run ]] || printf '%s\n' "${summary[@]}"
  [[ ! $caught ]] || { trap - "$caught" && kill -s "$caught" $$; } # so that a shell's loop ends too
  return $failed
}

main "$@"
