#!/bin/sh
# Cargo's rustc-wrapper for a crate with path dependencies outside of its workspace. Cargo identifies those by their
# absolute directories, which rustc hashes into types and symbols: the same sources would give other bytes elsewhere.
# Name and version are as good, as a lock file holds no two local packages that share them.
case ${CARGO_MANIFEST_DIR-} in
"" | "${CARGO_HOME:-$HOME/.cargo}"/* | */rustlib/src/*) ;;
*)
    for argument do
        shift
        case $argument in
        metadata=*) argument="metadata=$CARGO_PKG_NAME-$CARGO_PKG_VERSION-$CARGO_CRATE_NAME" ;;
        esac
        set -- "$@" "$argument"
    done
    ;;
esac
exec ${AWESOME_WASM_RUSTC_WRAPPER:+"$AWESOME_WASM_RUSTC_WRAPPER"} "$@"
