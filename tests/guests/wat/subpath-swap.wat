;; Mounted with the root of a volume whose directory `s` another container has by subPath, it waits for the file `s/go` and puts a
;; link that leads four directories up in the place of `s`. Its exit code is the number of the first error of WASI's.
(module
  (import "wasi_snapshot_preview1" "path_filestat_get" (func $stat (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_rename" (func $rename (param i32 i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_symlink" (func $symlink (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (data (i32.const 100) "s")
  (data (i32.const 110) "t")
  (data (i32.const 120) "../../../..")
  (data (i32.const 140) "s/go")
  (func (export "_start")
    (local $error i32)
    (loop $wait
      (br_if $wait (call $stat (i32.const 3) (i32.const 0) (i32.const 140) (i32.const 4) (i32.const 200))))
    (local.set $error
      (call $rename (i32.const 3) (i32.const 100) (i32.const 1) (i32.const 3) (i32.const 110) (i32.const 1)))
    (if (local.get $error) (then (call $exit (local.get $error))))
    (call $exit (call $symlink (i32.const 120) (i32.const 11) (i32.const 3) (i32.const 100) (i32.const 1)))))
