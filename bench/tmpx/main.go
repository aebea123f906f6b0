package main
import ("context";"database/sql";"fmt";"os";"strconv";"strings";"slices";"time";"os/exec"
_ "github.com/lib/pq"
"github.com/fastpgcache/fastpgcache"
"github.com/fastpgcache/fastpgcache/internal/pgtest")
func cpu(pid int) int64 { b,_:=os.ReadFile(fmt.Sprintf("/proc/%d/schedstat",pid)); r,_,_:=strings.Cut(string(b)," "); n,_:=strconv.ParseInt(r,10,64); return n }
func main(){
 ctx:=context.Background()
 server,err:=pgtest.Start(ctx,pgtest.Config{Settings:map[string]string{"shared_buffers":"512MB","autovacuum":"off"}}); if err!=nil{panic(err)}
 defer server.Stop()
 admin,_:=sql.Open("postgres",server.DSN("postgres"))
 if err:=fastpgcache.Setup(ctx,admin,fastpgcache.SetupConfig{});err!=nil{panic(err)}
 admin.Exec(`CREATE ROLE app LOGIN`)
 if _,err:=admin.Exec(`CREATE UNLOGGED TABLE feed2 (user_id text COLLATE "C" NOT NULL DEFAULT current_user, xid bigint NOT NULL DEFAULT txid_current(), keys text[]); CREATE INDEX ON feed2 (user_id, xid); GRANT ALL ON feed2 TO app; ALTER TABLE feed2 ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON feed2 USING (user_id = current_user);
 CREATE UNLOGGED TABLE feed3 (user_id text COLLATE "C" NOT NULL DEFAULT current_user, xid bigint NOT NULL DEFAULT txid_current(), keys text[]);  GRANT ALL ON feed3 TO app`);err!=nil{panic(err)}
 db,_:=sql.Open("postgres",strings.Replace(server.DSN("postgres"),"user=postgres","user=app",1)+" binary_parameters=yes"); db.SetMaxOpenConns(1)
 var pid int; db.QueryRow(`SELECT pg_backend_pid()`).Scan(&pid)
 ins:=`INSERT INTO public.cache (user_id, key, value, value_bytes, expires_at, mark)
  VALUES (current_user, $1, $2, $3, statement_timestamp() + $4::float8 * interval '1 microsecond', txid_current())
  ON CONFLICT (user_id, key) DO UPDATE
  SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at, mark = excluded.mark`
 ch:=`change AS (INSERT INTO public.cache_change (user_id, keys) VALUES (current_user, ARRAY[$1::text]))`
 vs:=[][2]string{
 {"nofeed nomark",strings.NewReplacer(", mark)",")",", txid_current()","",", mark = excluded.mark","").Replace(ins)},
 {"nofeed",ins},
 {"cte+insert","WITH "+ch+" "+ins},
 {"cte+insert returning","WITH "+ch+" "+ins+" RETURNING mark, date_part('epoch'::text, statement_timestamp())"},
 {"current","WITH "+ch+", stored AS ("+ins+") SELECT txid_current(), date_part('epoch'::text, statement_timestamp())"},
 {"no check rows", "WITH "+strings.Replace(ch,"cache_change","feed2",1)+" "+ins},
 {"base", `INSERT INTO old.cache (user_id, key, value, value_bytes, expires_at)
VALUES (current_user, $1, $2, $3, statement_timestamp() + $4::float8 * interval '1 microsecond')
ON CONFLICT (user_id, key) DO UPDATE
SET value = excluded.value, value_bytes = excluded.value_bytes, expires_at = excluded.expires_at`},
 {"card check", "WITH "+strings.Replace(ch,"cache_change","feed4",1)+" "+ins},
 {"no index", "WITH "+strings.Replace(ch,"cache_change","feed3",1)+" "+ins},
 {"current force generic","WITH "+ch+", stored AS ("+ins+") SELECT txid_current(), date_part('epoch'::text, statement_timestamp()) "},
 }
 if os.Getenv("NOTRIG")!="" { admin.Exec(`ALTER TABLE cache DISABLE TRIGGER ALL`) }
 oldsql,_:=os.ReadFile("/tmp/old.sql")
 cn,_:=admin.Conn(ctx); if _,err:=cn.ExecContext(ctx,"SET fastpgcache.schema='old'; SET fastpgcache.grantee='app'"); err!=nil{panic(err)}
 if _,err:=cn.ExecContext(ctx,string(oldsql)); err!=nil{panic(err)}; cn.Close()
 if _,err:=admin.Exec(`CREATE UNLOGGED TABLE feed4 (user_id text COLLATE "C" NOT NULL DEFAULT current_user, xid bigint NOT NULL DEFAULT txid_current(), keys text[] CHECK (cardinality(keys) <= 2000)); CREATE INDEX ON feed4 (user_id, xid); GRANT ALL ON feed4 TO app; ALTER TABLE feed4 ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON feed4 USING (user_id = current_user);`);err!=nil{panic(err)}
 res:=map[string][]float64{}
 var stmts []*sql.Stmt
 for _,v:=range vs { s,err:=db.Prepare(v[1]); if err!=nil{panic(v[0]+err.Error())}; stmts=append(stmts,s)}
 val:=strings.Repeat("v",100)
 if w:=os.Getenv("PERF"); w!="" { for i,v:=range vs { if v[0]==w {
   go func(){ out,_:=exec.Command("perf","record","-e","cpu-clock","-F","5000","-o","/tmp/perf.data","-p",strconv.Itoa(pid),"sleep","4").CombinedOutput(); _=out }()
   for t:=time.Now(); time.Since(t)<5*time.Second; { for n:=range 100 { stmts[i].Exec("k"+strconv.Itoa(n%2000),val,nil,int64(3600e6)) } } } }; return }
 for r:=range 150 { for i,v:=range vs {
  if r%30==0 && i==0 { admin.Exec("VACUUM cache"); admin.Exec("TRUNCATE cache_change") }
  if v[0]=="current force generic" { db.Exec("SET plan_cache_mode=force_generic_plan") } else { db.Exec("RESET plan_cache_mode") }
  b:=cpu(pid); n:=0
  for ; n<100; n++ { if _,err:=stmts[i].Exec("k"+strconv.Itoa(n%2000),val,nil,int64(3600e6)); err!=nil{panic(err)} }
  if r>0 { res[v[0]]=append(res[v[0]],float64(cpu(pid)-b)/1e3/float64(n)) }
 }}
 for _,v:=range vs { slices.Sort(res[v[0]]); fmt.Printf("%-24s %.1f  %v\n",v[0],res[v[0]][len(res[v[0]])/8],res[v[0]][len(res[v[0]])/2]) }
}
